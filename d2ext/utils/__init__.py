"""Pictures and videos: drawing predictions, reading and writing files of frames."""
