"""Publishing and downloading datasets."""
