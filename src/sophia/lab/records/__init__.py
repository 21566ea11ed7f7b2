"""What runs leave on the disk, read without trusting it: folders, and packs of many runs in one file."""
