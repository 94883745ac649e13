//! Unsafe island: the userfaultfd ioctls that dirty tracking needs.
//!
//! Layouts and numbers are those of `linux/userfaultfd.h` (Linux 6.7 and later).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::maps::Mapping;

/// `UFFD_API`.
const UFFD_API: u64 = 0xaa;
/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// The features that one handshake asks for, enough for dirty tracking and for post-copy later:
/// a userfaultfd has one handshake in its life.
///
/// `PAGEFAULT_FLAG_WP | MISSING_SHMEM | THREAD_ID | MINOR_SHMEM | EXACT_ADDRESS |
/// WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC`.
pub const UFFD_FEATURES: u64 =
    1 | 1 << 5 | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 15;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Register>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24);

/// The generated functions are as unsafe as the ioctl they issue.
mod raw {
    #![allow(missing_docs, unreachable_pub)]
    use super::{Api, Range, Register, WriteProtect};

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    // The header declares UFFDIO_UNREGISTER with _IOR although the kernel reads it.
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    nix::ioctl_readwrite!(writeprotect, 0xaa, 0x06, WriteProtect);
}

/// Does the `UFFDIO_API` handshake with [`UFFD_FEATURES`]: once in the life of the descriptor.
///
/// # Errors
/// `EINVAL` if the kernel lacks one of the features (it needs Linux 6.7), or if the handshake
/// was done before.
pub fn handshake(uffd: BorrowedFd<'_>) -> io::Result<()> {
    let mut api = Api {
        api: UFFD_API,
        features: UFFD_FEATURES,
        ioctls: 0,
    };
    // SAFETY: `api` is a live, properly sized and aligned struct for the whole call.
    unsafe { raw::api(uffd.as_raw_fd(), &raw mut api) }?;
    Ok(())
}

/// Registers the mapping for write protection; again on a registered mapping is no error.
pub(super) fn register_wp(uffd: BorrowedFd<'_>, mapping: Mapping) -> io::Result<()> {
    let mut register = Register {
        range: range(mapping),
        mode: REGISTER_MODE_WP,
        ioctls: 0,
    };
    // SAFETY: `register` is a live, properly sized and aligned struct for the whole call. The
    // range names addresses of another process; with WP_ASYNC a write fault there is resolved by
    // the kernel itself, so nobody can be left waiting for us.
    unsafe { raw::register(uffd.as_raw_fd(), &raw mut register) }?;
    Ok(())
}

/// Takes the registration and every write protection back.
pub(super) fn unregister(uffd: BorrowedFd<'_>, mapping: Mapping) -> io::Result<()> {
    let mut range = range(mapping);
    // SAFETY: `range` is a live, properly sized and aligned struct; the kernel only reads it.
    unsafe { raw::unregister(uffd.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

/// Write-protects every page of the mapping, the unpopulated ones as well.
pub(super) fn write_protect(uffd: BorrowedFd<'_>, mapping: Mapping) -> io::Result<()> {
    let mut protect = WriteProtect {
        range: range(mapping),
        mode: WRITEPROTECT_MODE_WP,
    };
    loop {
        // SAFETY: `protect` is a live, properly sized and aligned struct for the whole call.
        match unsafe { raw::writeprotect(uffd.as_raw_fd(), &raw mut protect) } {
            Ok(_) => return Ok(()),
            // The target's mappings were changing at that moment, ioctl_userfaultfd(2).
            Err(nix::errno::Errno::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn range(mapping: Mapping) -> Range {
    Range {
        start: mapping.start,
        len: mapping.end - mapping.start,
    }
}
