//! Unsafe island: the userfaultfd ioctls that dirty tracking and post-copy need.
//!
//! Layouts and numbers are those of `linux/userfaultfd.h` (Linux 6.7 and later).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::maps::Mapping;

/// `UFFD_API`.
const UFFD_API: u64 = 0xaa;
/// `UFFDIO_REGISTER_MODE_MISSING`.
const REGISTER_MODE_MISSING: u64 = 1 << 0;
/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_MODE_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// `sizeof(struct uffd_msg)`.
const MESSAGE: usize = 32;
/// Where `arg.pagefault.address` lies in it.
const MESSAGE_ADDRESS: usize = 16;
/// Messages that one read takes: no guest has that many CPUs waiting at once for long.
const MESSAGES: usize = 16;

/// The features that one handshake asks for, enough for dirty tracking and for post-copy:
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

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeropage: i64,
}

const _: () = assert!(size_of::<Copy>() == 40);
const _: () = assert!(size_of::<ZeroPage>() == 32);
const _: () = assert!(size_of::<Api>() == 24);
const _: () = assert!(size_of::<Range>() == 16);
const _: () = assert!(size_of::<Register>() == 32);
const _: () = assert!(size_of::<WriteProtect>() == 24);

/// The generated functions are as unsafe as the ioctl they issue.
mod raw {
    #![allow(missing_docs, unreachable_pub)]
    use super::{Api, Copy, Range, Register, WriteProtect, ZeroPage};

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    // The header declares UFFDIO_UNREGISTER with _IOR although the kernel reads it.
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    // And so for UFFDIO_WAKE.
    nix::ioctl_read!(wake, 0xaa, 0x02, Range);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);
    nix::ioctl_readwrite!(zeropage, 0xaa, 0x04, ZeroPage);
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
///
/// With WP_ASYNC a write fault is resolved by the kernel itself: nobody can be left waiting for us.
pub(super) fn register_wp(uffd: BorrowedFd<'_>, mapping: Mapping) -> io::Result<()> {
    register(uffd, mapping, REGISTER_MODE_WP)
}

/// Registers the mapping for missing pages; again on a registered mapping is no error.
///
/// From here on whoever touches a page that the file does not hold waits until it is put in place, or
/// until the registration is taken back.
pub(super) fn register_missing(uffd: BorrowedFd<'_>, mapping: Mapping) -> io::Result<()> {
    register(uffd, mapping, REGISTER_MODE_MISSING)
}

fn register(uffd: BorrowedFd<'_>, mapping: Mapping, mode: u64) -> io::Result<()> {
    let mut register = Register {
        range: range(mapping),
        mode,
        ioctls: 0,
    };
    // SAFETY: `register` is a live, properly sized and aligned struct for the whole call. The
    // range names addresses of another process, whose content this does not change.
    unsafe { raw::register(uffd.as_raw_fd(), &raw mut register) }?;
    Ok(())
}

/// What came of putting pages in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// This many bytes from the start, at least one page; whoever waited for them goes on.
    Bytes(u64),
    /// The first page is there already, and was not touched.
    Exists,
}

/// Puts `content` in place at address `at` of the process, page by page until one exists.
pub(super) fn copy(uffd: BorrowedFd<'_>, at: u64, content: &[u8]) -> io::Result<Filled> {
    let mut arg = Copy {
        dst: at,
        src: content.as_ptr() as u64,
        len: content.len() as u64,
        mode: 0,
        copy: 0,
    };
    loop {
        // SAFETY: `arg` is a live, properly sized and aligned struct for the whole call; `src` and `len` describe
        // exactly the slice `content`, which the kernel only reads. `dst` is an address of another process.
        let result = unsafe { raw::copy(uffd.as_raw_fd(), &raw mut arg) };
        if let Some(filled) = filled(result, arg.copy, arg.len)? {
            return Ok(filled);
        }
    }
}

/// Puts zeros in place at addresses `at..at + len` of the process, page by page until one exists.
pub(super) fn zero(uffd: BorrowedFd<'_>, at: u64, len: u64) -> io::Result<Filled> {
    let mut arg = ZeroPage {
        range: Range { start: at, len },
        mode: 0,
        zeropage: 0,
    };
    loop {
        // SAFETY: `arg` is a live, properly sized and aligned struct for the whole call; its range names addresses of
        // another process.
        let result = unsafe { raw::zeropage(uffd.as_raw_fd(), &raw mut arg) };
        if let Some(filled) = filled(result, arg.zeropage, len)? {
            return Ok(filled);
        }
    }
}

/// ioctl_userfaultfd(2): a partial success is EAGAIN with a byte count, and so are mappings in change, with an error in
/// the place of the count. `None`: to be tried again.
fn filled(result: nix::Result<i32>, done: i64, len: u64) -> io::Result<Option<Filled>> {
    use nix::errno::Errno;
    match (result, u64::try_from(done)) {
        (Ok(_), _) => Ok(Some(Filled::Bytes(len))),
        (Err(Errno::EAGAIN), Ok(bytes @ 1..)) => Ok(Some(Filled::Bytes(bytes))),
        (Err(Errno::EAGAIN), _) => Ok(None),
        (Err(Errno::EEXIST), _) => Ok(Some(Filled::Exists)),
        (Err(errno), _) => Err(errno.into()),
    }
}

/// Lets everybody go on who waits for a page of the mapping; who still misses one reports it anew.
pub(super) fn wake(uffd: BorrowedFd<'_>, mapping: Mapping) -> io::Result<()> {
    let mut range = range(mapping);
    // SAFETY: `range` is a live, properly sized and aligned struct; the kernel only reads it.
    unsafe { raw::wake(uffd.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

/// Reads the addresses at which somebody waits for a page; none if nobody has come since the last read.
pub(super) fn read_faults(uffd: BorrowedFd<'_>, addresses: &mut Vec<u64>) -> io::Result<()> {
    let mut messages = [0; MESSAGE * MESSAGES];
    let got = match nix::unistd::read(uffd, &mut messages) {
        Ok(got) => got,
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    for message in messages[..got].chunks_exact(MESSAGE) {
        let address = &message[MESSAGE_ADDRESS..MESSAGE_ADDRESS + 8];
        if let (EVENT_PAGEFAULT, Ok(address)) = (message[0], address.try_into()) {
            addresses.push(u64::from_ne_bytes(address));
        }
    }
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
