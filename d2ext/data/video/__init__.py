"""Videos: records of videos, their readers, and mappers of frame pairs."""
