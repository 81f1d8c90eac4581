"""Every objective of the family, one file each."""
