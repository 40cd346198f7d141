"""`sslr1.train` on a file system without locks that can't flush folders. For test_disk.py."""

import errno
import fcntl
import os
import stat

from sslr1.train import main

if __name__ == "__main__":
    fsync = os.fsync

    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def flush(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    fcntl.flock, os.fsync = flock, flush
    main()
