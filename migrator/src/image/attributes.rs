//! Owner, mode and times of what an archive's entry made.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat, futimens, mknodat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown};

use super::rootfs::{Parent, RootfsError};
use super::tar::Entry;

/// Text and error of a failed step, before the path is known.
pub(super) struct Failed(pub(super) &'static str, pub(super) io::Error);

impl Failed {
    pub(super) fn of(self, entry: &Entry) -> RootfsError {
        RootfsError::Io {
            path: entry.shown(),
            what: self.0,
            source: self.1,
        }
    }
}

pub(super) fn failed(what: &'static str) -> impl Fn(Errno) -> Failed {
    move |errno| Failed(what, errno.into())
}

pub(super) fn set_owner_and_mode(fd: &OwnedFd, entry: &Entry) -> Result<(), Failed> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    fchown(fd, Some(uid), Some(gid)).map_err(failed("set the owner"))?;
    // After the owner: chown clears the setuid bit.
    fchmod(fd, Mode::from_bits_truncate(entry.mode)).map_err(failed("set the mode"))
}

pub(super) fn set_time(fd: &OwnedFd, time: (i64, u32)) -> Result<(), Failed> {
    let time = time_spec(time);
    futimens(fd, &time, &time).map_err(failed("set the time"))
}

pub(super) fn time_spec((seconds, nanos): (i64, u32)) -> TimeSpec {
    TimeSpec::new(seconds, i64::from(nanos))
}

pub(super) fn make_node(
    parent: &Parent,
    name: &OsStr,
    kind: SFlag,
    device: nix::libc::dev_t,
) -> nix::Result<()> {
    mknodat(
        &parent.fd,
        name,
        kind,
        Mode::from_bits_truncate(0o600),
        device,
    )
}

pub(super) fn lstat(parent: &Parent, name: &OsStr) -> nix::Result<FileStat> {
    fstatat(&parent.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW)
}

pub(super) fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}
