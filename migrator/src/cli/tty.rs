//! The caller's terminal: raw mode that is always undone, and its size. An island of `unsafe`: one ioctl.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::api::types::TtySize;

/// Keeps a terminal in raw mode, and gives it back as it was when dropped.
pub(super) struct RawMode {
    terminal: std::io::Stdin,
    before: Termios,
}

impl RawMode {
    /// Puts standard input's terminal into raw mode.
    pub(super) fn enter() -> io::Result<Self> {
        let terminal = io::stdin();
        let before = tcgetattr(terminal.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Nothing is left to do about a terminal that is gone.
        let _ = tcsetattr(self.terminal.as_fd(), SetArg::TCSADRAIN, &self.before);
    }
}

/// The size of the terminal behind `fd`; `None` if it is none.
pub(super) fn size(fd: BorrowedFd<'_>) -> Option<TtySize> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: needed because nothing in our dependencies wraps TIOCGWINSZ. The fd is borrowed and so
    // open during the call, and the kernel writes one `struct winsize` (asm-generic/termios.h), which
    // is what the pointer leads to.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (result == 0).then_some(TtySize {
        rows: size.ws_row,
        cols: size.ws_col,
    })
}
