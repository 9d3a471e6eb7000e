"""Where things lie: the layout shared by the work directory and the bucket, and atomic local writes."""
