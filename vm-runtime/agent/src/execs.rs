//! Processes that the host runs in a container: on three pipes or on a terminal.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use guest_agent::protocol::message::{Blob, EXEC_WINDOW, Event, ExecId, ExecSpec, Failure, Stream};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, pipe2};

use crate::containers::{Entrance, failed};
use crate::disks::Root;
use crate::launch::{Launch, Place, Program, Stdio};
use crate::outbox::Outbox;
use crate::streams::{Chunk, Output, unblock};
use crate::sys;

/// One such process.
pub(crate) struct Exec {
    id: ExecId,
    pid: Pid,
    outputs: [Option<Output>; 2],
    /// Output bytes that the consumer has not taken.
    owed: u64,
    input: Option<File>,
    waiting: VecDeque<u8>,
    /// Close the input once nothing waits.
    eof: bool,
    terminal: Option<File>,
    exit: Option<i32>,
}

/// A new terminal of a container: its master, and its slave.
pub(crate) fn open_terminal(root: &Root, rows: u16, cols: u16) -> Result<(File, OwnedFd), Failure> {
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(root.devices.ptmx())
        .map_err(failed)?;
    let slave = sys::open_slave(master.as_fd()).map_err(failed)?;
    sys::resize_terminal(master.as_fd(), rows, cols).map_err(failed)?;
    Ok((master, slave))
}

impl Exec {
    /// Starts it.
    pub(crate) fn start(id: ExecId, spec: &ExecSpec, at: &Entrance<'_>) -> Result<Self, Failure> {
        let mut env = at.env.to_vec();
        let mut exec = Self {
            id,
            pid: Pid::from_raw(0),
            outputs: [None, None],
            owed: 0,
            input: None,
            waiting: VecDeque::new(),
            eof: false,
            terminal: None,
            exit: None,
        };
        let stdio = match spec.tty {
            Some((rows, cols)) => {
                env.push(("TERM".into(), "xterm".into()));
                exec.open_terminal(at, rows, cols)?
            }
            None => exec.open_pipes(spec.stdin)?,
        };
        env.extend(spec.env.iter().cloned());
        (exec.pid, _) = Launch {
            place: Place::Join(at.namespaces),
            cgroup: at.cgroup,
            program: Program {
                argv: spec.argv.clone(),
                env,
                working_dir: at.spec.working_dir.clone(),
                user: at.spec.user.clone(),
                rights: at.rights.clone(),
            },
            stdio,
        }
        .run()?;
        Ok(exec)
    }

    fn open_terminal(&mut self, at: &Entrance<'_>, rows: u16, cols: u16) -> Result<Stdio, Failure> {
        let (master, slave) = open_terminal(at.root, rows, cols)?;
        let copy = || master.try_clone().map_err(failed);
        self.outputs[0] = Some(Output::new(OwnedFd::from(copy()?)).map_err(failed)?);
        self.input = Some(copy()?);
        self.terminal = Some(master);
        Ok(Stdio::Terminal(slave))
    }

    fn open_pipes(&mut self, with_input: bool) -> Result<Stdio, Failure> {
        let (out, out_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (err, err_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        self.outputs = [
            Some(Output::new(out).map_err(failed)?),
            Some(Output::new(err).map_err(failed)?),
        ];
        let input = if with_input {
            let (end, input) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
            unblock(input.as_fd()).map_err(failed)?;
            self.input = Some(input.into());
            end
        } else {
            File::open("/dev/null").map_err(failed)?.into()
        };
        Ok(Stdio::Pipes([input, out_end, err_end]))
    }

    /// Queues input. More than the window is the host's mistake and is dropped.
    pub(crate) fn stdin(&mut self, data: &[u8], eof: bool, outbox: &mut Outbox) {
        if self.waiting.len() as u64 + data.len() as u64 <= EXEC_WINDOW {
            self.waiting.extend(data);
        }
        self.eof |= eof;
        self.feed(outbox);
    }

    /// Moves waiting input to the process, as far as it takes it.
    pub(crate) fn feed(&mut self, outbox: &mut Outbox) {
        let mut taken = 0;
        while let Some(input) = self.input.as_mut().filter(|_| !self.waiting.is_empty()) {
            match input.write(self.waiting.as_slices().0) {
                Ok(n) => {
                    self.waiting.drain(..n);
                    taken += n;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.input = None,
            }
        }
        if self.input.is_none() {
            // Nobody will read it: the sender need not wait.
            taken += self.waiting.len();
            self.waiting.clear();
        }
        if self.eof && self.waiting.is_empty() && self.input.is_some() {
            if self.terminal.is_some() {
                // A terminal has no end to close: ^D is how it says so.
                self.input.as_mut().map(|i| i.write(&[4]));
                self.eof = false;
            } else {
                self.input = None;
            }
        }
        if taken > 0 {
            outbox.event(Event::StdinCredit {
                exec: self.id,
                bytes: taken as u32,
            });
        }
    }

    /// The input, if it is to be polled for room.
    pub(crate) fn writable(&self) -> Option<BorrowedFd<'_>> {
        self.input
            .as_ref()
            .filter(|_| !self.waiting.is_empty())
            .map(AsFd::as_fd)
    }

    /// An output, if it is to be polled: not ended, and with room in the window.
    pub(crate) fn readable(&self, stream: Stream) -> Option<BorrowedFd<'_>> {
        self.outputs[stream as usize]
            .as_ref()
            .filter(|_| self.owed < EXEC_WINDOW)
            .and_then(Output::fd)
    }

    /// The consumer has taken this many bytes.
    pub(crate) fn credit(&mut self, bytes: u32) {
        self.owed = self.owed.saturating_sub(bytes.into());
    }

    /// Moves what one output has to the host, as far as the window goes.
    pub(crate) fn pump(&mut self, stream: Stream, outbox: &mut Outbox) {
        let Some(output) = &mut self.outputs[stream as usize] else {
            return;
        };
        while let Chunk::Data(_, data) = output.read(EXEC_WINDOW.saturating_sub(self.owed)) {
            self.owed += data.len() as u64;
            outbox.event(Event::ExecOutput {
                exec: self.id,
                stream,
                data: Blob(data),
            });
        }
    }

    /// After the end: moves the last output, and once there is no more, tells the end. True then.
    pub(crate) fn finish(&mut self, outbox: &mut Outbox) -> bool {
        let Some(code) = self.exit else {
            return false;
        };
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.pump(stream, outbox);
        }
        if self.owed >= EXEC_WINDOW {
            return false;
        }
        outbox.event(Event::ExecExited {
            exec: self.id,
            code,
        });
        true
    }

    /// Notes the end of the process, if `pid` is it.
    pub(crate) fn reaped(&mut self, pid: Pid, code: i32) -> bool {
        let ours = self.pid == pid && self.exit.is_none();
        if ours {
            self.exit = Some(code);
        }
        ours
    }

    pub(crate) fn resize(&self, rows: u16, cols: u16) {
        if let Some(terminal) = &self.terminal {
            sys::resize_terminal(terminal.as_fd(), rows, cols).ok();
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if self.exit.is_none() {
            kill(self.pid, signal).ok();
        }
    }

    /// Its host is gone: nobody will read its output or learn its end.
    pub(crate) fn abandon(&mut self) {
        self.outputs = [None, None];
        self.input = None;
        self.owed = 0;
        if self.exit.is_none() {
            // It leads a session, so its group is its own.
            killpg(self.pid, Signal::SIGKILL).ok();
        }
    }
}
