//! A lock on a file that other machines see: an open file description's record lock (fcntl(2), `F_OFD_SETLK`), which NFS passes to its
//! server. It ends with the descriptor, and so with the service.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// Between two tries. The one who has it may be ending.
const AGAIN: Duration = Duration::from_millis(5);

/// A lock that is held for as long as this lives.
#[derive(Debug)]
pub struct Held {
    pub(super) _file: File,
}

/// The whole file, for writing.
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Must be 0 for locks of open file descriptions, fcntl(2).
        l_pid: 0,
    }
}

/// Locks it, or waits until it can. False: another has it.
pub(super) fn lock(file: &File, within: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + within;
    loop {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&whole(libc::F_WRLCK))) {
            Ok(_) => return Ok(true),
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() >= deadline => return Ok(false),
            Err(Errno::EAGAIN | Errno::EACCES) => std::thread::sleep(AGAIN),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it_and_it_ends_with_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let open = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path).unwrap()
        };
        let (one, other) = (open(), open());
        assert!(lock(&one, Duration::ZERO).unwrap());
        assert!(!lock(&other, Duration::ZERO).unwrap());
        let ends = std::thread::spawn(move || drop(one));
        assert!(lock(&other, Duration::from_secs(10)).unwrap());
        ends.join().unwrap();
    }
}
