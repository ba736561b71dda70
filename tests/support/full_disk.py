"""A disk that fills up while a file is written."""

import errno
import os


class FullDisk:
    """A file on a disk with room for some bytes."""

    def __init__(self, file, room):
        self.file = file
        self.room = room

    def write(self, data):
        if self.room < len(data):
            self.file.write(data[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)
