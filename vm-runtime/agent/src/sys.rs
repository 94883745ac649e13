//! The agent's only `unsafe`: system calls that nix does not wrap.
//!
//! One invariant carries most of it: the agent has a single thread. So a forked child owns a whole,
//! consistent copy of the process, and may allocate, take locks and run any code before it executes.

use std::ffi::CStr;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Loads a kernel module. One that is there already is no error.
pub(crate) fn finit_module(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the kernel reads the file and an empty, NUL-terminated parameter string that is static.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match check(result) {
        Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

/// Mixes random bytes into the kernel's pool, counts them as such, and keys its generator anew from there (random(4)).
pub(crate) fn reseed(entropy: &[u8]) -> io::Result<()> {
    /// `RNDADDENTROPY`, `_IOW('R', 3, int[2])`, and `RNDRESEEDCRNG`, `_IO('R', 7)` (linux/random.h).
    const ADD_ENTROPY: libc::Ioctl = 0x4008_5203;
    const RESEED: libc::Ioctl = 0x5207;
    let device = std::fs::File::options().write(true).open("/dev/random")?;
    // struct rand_pool_info: bits, bytes, then the bytes.
    let mut info = Vec::with_capacity(8 + entropy.len());
    info.extend((entropy.len() as i32 * 8).to_ne_bytes());
    info.extend((entropy.len() as i32).to_ne_bytes());
    info.extend(entropy);
    // SAFETY: the kernel reads two integers and as many bytes as the second says, all of which are in `info`, which outlives
    // the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), ADD_ENTROPY, info.as_ptr()) }.into())?;
    // SAFETY: this one takes no argument.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RESEED) }.into()).map(drop)
}

/// Has the kernel clear so many bytes of free memory, and gives them back.
pub(crate) fn zero_free_memory(bytes: u64) -> io::Result<()> {
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    if length == 0 {
        return Ok(());
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a new mapping at an address that the kernel chooses takes no memory away from anybody.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: exactly the mapping that was just made, to which there is no reference.
    check(unsafe { libc::munmap(at, length) }.into()).map(drop)
}

/// `CLONE_INTO_CGROUP` (linux/sched.h): libc's constant overflows its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks into new namespaces (`CLONE_NEW*` in `flags`) and into a cgroup. Returns the child's pid and its pidfd, and `None` in the child.
pub(crate) fn fork_into(flags: i32, cgroup: BorrowedFd<'_>) -> io::Result<Option<(Pid, OwnedFd)>> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: clone_args is plain integers, for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64 | CLONE_INTO_CGROUP | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM and without a stack this is fork(2): the child goes on here in a copy
    // of the address space. The agent has one thread, so no lock is held by a thread that is not
    // copied. `args` and `pidfd`, which the kernel writes to, outlive the call.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has just made this descriptor for the parent, and nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Some((Pid::from_raw(pid as i32), pidfd)))
}

/// Ends this process without running destructors or flushing what the parent has buffered.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

/// Gives the default action back to every signal and unblocks them all: what a new program expects.
pub(crate) fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL runs no code of ours. KILL, STOP and libc's own numbers are refused, which is fine.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: `set` is filled in by sigemptyset before the kernel reads it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Makes a copy of the mount at `path` that is attached nowhere (open_tree(2)).
pub(crate) fn clone_mount(path: &CStr) -> io::Result<OwnedFd> {
    open_tree(path, libc::OPEN_TREE_CLONE)
}

/// The same with everything that is mounted in it.
pub(crate) fn clone_mounts(path: &CStr) -> io::Result<OwnedFd> {
    open_tree(path, libc::OPEN_TREE_CLONE | libc::AT_RECURSIVE as u32)
}

fn open_tree(path: &CStr, flags: u32) -> io::Result<OwnedFd> {
    let flags = flags | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `path` is NUL-terminated and outlives the call.
    let fd =
        check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Fills `head` from a Unix socket, with the descriptors that come beside its first byte.
pub(crate) fn receive(link: BorrowedFd<'_>, head: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    /// `SCM_MAX_FD` (include/net/scm.h): most descriptors of a message.
    const MOST: usize = 253;
    let mut space = nix::cmsg_space!([RawFd; MOST]);
    let wanted = head.len();
    let mut slices = [IoSliceMut::new(head)];
    // Small and sent at once, so it comes at once.
    let message = recvmsg::<()>(
        link.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL,
    )?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(more) = part {
            // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows them.
            fds.extend(
                more.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    match message.bytes == wanted {
        true => Ok(fds),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Attaches a mount made by [`clone_mount`] at `path`, or where a symlink there leads (move_mount(2)).
pub(crate) fn attach_mount(mount: BorrowedFd<'_>, path: &CStr) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated and outlive the call; the descriptor is borrowed for it.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_SYMLINKS,
        )
    })
    .map(drop)
}

/// Unlocks a terminal's slave side and opens it, by the master: no path can be swapped in between.
pub(crate) fn open_slave(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }.into())?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags by value.
    let fd = check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) }.into())?;
    // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Makes `terminal` the controlling terminal of the session that this process leads.
pub(crate) fn control_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer by value.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Tells a terminal its size, in characters.
pub(crate) fn resize_terminal(terminal: BorrowedFd<'_>, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())
        .map(drop)
}

/// Takes every capability that is not in `keep` (bit = number, linux/capability.h) out of the bounding set.
pub(crate) fn bound_capabilities(keep: u64) -> io::Result<()> {
    for capability in 0..64 {
        if keep & 1 << capability != 0 {
            continue;
        }
        // SAFETY: prctl with integers only.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match check(result.into()) {
            // The kernel has fewer than 64.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
            other => other?,
        };
    }
    Ok(())
}

/// capset(2) with version 3 structures (linux/capability.h).
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const _: () = assert!(size_of::<CapHeader>() == 8 && size_of::<CapData>() == 12);

/// Leaves this process the capabilities in `keep` and no others.
pub(crate) fn limit_capabilities(keep: u64) -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION_3: u32 = 0x2008_0522;
    let header = CapHeader {
        version: VERSION_3,
        pid: 0,
    };
    let half = |bits: u64| CapData {
        effective: bits as u32,
        permitted: bits as u32,
        inheritable: 0,
    };
    let data = [half(keep), half(keep >> 32)];
    // SAFETY: version 3 reads one header and two data structures, which outlive the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) }).map(drop)
}

/// No program that this process executes gets more rights than it has (prctl(2)).
pub(crate) fn no_new_privileges() -> io::Result<()> {
    // SAFETY: prctl with integers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}
