//! The unsafe island of asking how much the other end of a socket has not read yet.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The generated function is as unsafe as the ioctl it issues.
mod raw {
    #![allow(missing_docs, unreachable_pub)]
    use nix::libc;

    // SIOCOUTQ of unix(7) has TIOCOUTQ's number, linux/sockios.h.
    nix::ioctl_read_bad!(outgoing, libc::TIOCOUTQ, libc::c_int);
}

/// Bytes of buffers that were sent on a connected Unix socket and not read yet: 0 when everything has been.
pub(super) fn unread(socket: impl AsFd) -> io::Result<u32> {
    let mut bytes = 0;
    // SAFETY: `bytes` is a live integer of the type that this ioctl writes.
    unsafe { raw::outgoing(socket.as_fd().as_raw_fd(), &raw mut bytes) }?;
    // The kernel never says less than none.
    Ok(u32::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_was_sent_counts_until_it_is_read() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(unread(&ours).unwrap(), 0);
        ours.write_all(&[7; 100]).unwrap();
        assert!(unread(&ours).unwrap() >= 100);
        theirs.read_exact(&mut [0; 60]).unwrap();
        assert!(unread(&ours).unwrap() > 0);
        theirs.read_exact(&mut [0; 40]).unwrap();
        assert_eq!(unread(&ours).unwrap(), 0);
    }
}
