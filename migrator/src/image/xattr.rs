//! Extended attributes of archive entries.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use super::sys;
use super::tar::Entry;

/// What failed, for a message.
pub(super) const WHAT: &str = "set an extended attribute";

/// Most bytes of values an entry may carry: what the kernel takes for one (XATTR_SIZE_MAX in linux/limits.h),
/// and what fits EROFS's inline area.
const MAX_TOTAL: usize = 64 << 10;

/// What gets the attributes.
pub(super) enum Target<'a> {
    /// An open file or directory.
    Open(BorrowedFd<'a>),
    /// Something in a directory, which may not be opened: a symlink, a device.
    At(BorrowedFd<'a>, &'a OsStr),
}

/// Sets the entry's attributes. Two kinds are left out: SELinux labels, which mean nothing under the guest's
/// kernel, and overlayfs's own marks, by which an image could make the guest's overlay hide files.
pub(super) fn set(entry: &Entry, target: &Target<'_>) -> io::Result<()> {
    let total: usize = entry
        .xattrs
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if total > MAX_TOTAL {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its extended attributes are longer than 64 KiB",
        ));
    }
    for (name, value) in &entry.xattrs {
        if name == b"security.selinux"
            || name.starts_with(b"trusted.overlay.")
            || name.starts_with(b"user.overlay.")
        {
            continue;
        }
        set_one(name, value, target).map_err(|error| {
            let shown = String::from_utf8_lossy(name);
            io::Error::new(error.kind(), format!("{shown}: {error}"))
        })?;
    }
    Ok(())
}

fn set_one(name: &[u8], value: &[u8], target: &Target<'_>) -> io::Result<()> {
    let name = CString::new(name)?;
    match target {
        Target::Open(fd) => sys::fsetxattr(*fd, &name, value),
        Target::At(dir, file) => {
            // There is no setxattrat(2) before Linux 6.13; the link in /proc leads to the open directory.
            let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
            path.extend_from_slice(file.as_bytes());
            sys::lsetxattr(&CString::new(path)?, &name, value)
        }
    }
}
