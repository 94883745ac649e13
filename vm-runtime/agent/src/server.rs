//! The agent's one loop: what is ready is moved, and nothing else ever waits.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use anyhow::{Context, Result};
use guest_agent::protocol::link::GuestInput;
use guest_agent::protocol::message::{Event, ExecId, HostMessage, Reply, Stream};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::boot::uptime_ms;
use crate::execs::Exec;
use crate::outbox::Outbox;
use crate::pod::Pod;
use crate::port::Port;
use crate::requests::Answers;

/// How long bytes may wait for the port before the agent tries again without being told to, in milliseconds.
const RETRY_MS: u16 = 500;

/// Everything the agent is.
pub(crate) struct Agent {
    port: Port,
    signals: SignalFd,
    pub(crate) outbox: Outbox,
    pub(crate) pod: Pod,
    pub(crate) execs: BTreeMap<ExecId, Exec>,
    pub(crate) answers: Answers,
}

/// What a polled descriptor stands for.
#[derive(Clone, Copy)]
enum Source {
    Port,
    Signals,
    Container(usize, Stream),
    ExecOutput(ExecId, Stream),
    ExecInput(ExecId),
}

impl Agent {
    /// Takes the port and the signals.
    pub(crate) fn new(port: Port) -> Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        set.thread_block().context("blocking SIGCHLD")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&set, flags).context("making a signalfd")?;
        let mut outbox = Outbox::default();
        outbox.event(Event::Ready {
            kernel: nix::sys::utsname::uname()
                .map(|u| u.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            boot_ms: uptime_ms(),
        });
        Ok(Self {
            port,
            signals,
            outbox,
            pod: Pod::default(),
            execs: BTreeMap::new(),
            answers: Answers::default(),
        })
    }

    /// Runs until the VM ends.
    pub(crate) fn run(mut self) -> Result<()> {
        loop {
            self.port.write(&mut self.outbox.link);
            for source in self.wait()? {
                match source {
                    Source::Port => self.hear(),
                    Source::Signals => self.reap(),
                    Source::Container(index, stream) => {
                        self.pod.containers[index].pump(stream, &mut self.outbox);
                    }
                    Source::ExecOutput(id, stream) => {
                        if let Some(exec) = self.execs.get_mut(&id) {
                            exec.pump(stream, &mut self.outbox);
                        }
                    }
                    Source::ExecInput(id) => {
                        if let Some(exec) = self.execs.get_mut(&id) {
                            exec.feed(&mut self.outbox);
                        }
                    }
                }
            }
            self.finish();
        }
    }

    fn wait(&mut self) -> Result<Vec<Source>> {
        let released = self.outbox.released();
        let wakes = self.pod.wakes().map(|at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            u16::try_from(left).unwrap_or(u16::MAX)
        });
        let mut sources = vec![Source::Port, Source::Signals];
        let mut fds = vec![
            watch(self.port.fd(), PollFlags::POLLIN),
            watch(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        for (index, container) in self.pod.containers.iter_mut().enumerate() {
            for (stream, fd) in container.readable(released) {
                sources.push(Source::Container(index, stream));
                fds.push(watch(fd, PollFlags::POLLIN));
            }
        }
        for (id, exec) in &self.execs {
            for stream in [Stream::Stdout, Stream::Stderr] {
                if let Some(fd) = exec.readable(stream) {
                    sources.push(Source::ExecOutput(*id, stream));
                    fds.push(watch(fd, PollFlags::POLLIN));
                }
            }
            if let Some(fd) = exec.writable() {
                sources.push(Source::ExecInput(*id));
                fds.push(watch(fd, PollFlags::POLLOUT));
            }
        }
        let timeout = match (self.port.has_pending(), wakes) {
            (false, None) => PollTimeout::NONE,
            (false, Some(left)) => PollTimeout::from(left),
            (true, left) => PollTimeout::from(left.unwrap_or(RETRY_MS).min(RETRY_MS)),
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("polling"),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
        let ready: Vec<bool> = fds.iter().map(ready).collect();
        Ok(sources
            .into_iter()
            .zip(ready)
            .filter_map(|(s, r)| r.then_some(s))
            .collect())
    }

    /// Takes what the host has sent.
    fn hear(&mut self) {
        for frame in self.port.read() {
            match self.outbox.link.receive(frame) {
                GuestInput::Nothing => {}
                GuestInput::Attached { fresh } => {
                    self.port.clear();
                    if fresh {
                        self.execs.values_mut().for_each(Exec::abandon);
                    }
                }
                GuestInput::Message(bytes) => match postcard::from_bytes(&bytes) {
                    Ok(message) => self.obey(message),
                    Err(e) => {
                        self.outbox.event(Event::Error {
                            context: "reading a message from the host".into(),
                            message: e.to_string(),
                        });
                    }
                },
            }
        }
    }

    fn obey(&mut self, message: HostMessage) {
        match message {
            HostMessage::Request { id, request } => {
                self.request(id, request);
                // The next one may be here already, and take long.
                self.port.write(&mut self.outbox.link);
            }
            HostMessage::Stdin { exec, data, eof } => {
                if let Some(exec) = self.execs.get_mut(&exec) {
                    exec.stdin(&data.0, eof, &mut self.outbox);
                }
            }
            HostMessage::Resize { exec, rows, cols } => {
                if let Some(exec) = self.execs.get(&exec) {
                    exec.resize(rows, cols);
                }
            }
            HostMessage::ExecSignal { exec, signal } => {
                if let (Some(exec), Ok(signal)) = (self.execs.get(&exec), Signal::try_from(signal))
                {
                    exec.signal(signal);
                }
            }
            HostMessage::OutputCredit { exec, bytes } => {
                if let Some(exec) = self.execs.get_mut(&exec) {
                    exec.credit(bytes);
                }
            }
        }
    }

    /// Waits for every child that has ended: the pod's, and orphans that fell to PID 1.
    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let (pid, code) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(_) => continue,
            };
            if !self.pod.child_ended(pid, code, &mut self.outbox) {
                let _ours = self.execs.values_mut().any(|e| e.reaped(pid, code));
            }
        }
    }

    /// Tells the ends whose last output has gone out, and kills what has outstayed its grace.
    fn finish(&mut self) {
        let outbox = &mut self.outbox;
        self.execs.retain(|_, exec| !exec.finish(outbox));
        for id in self.pod.finish(outbox, Instant::now()) {
            self.answer(id, Ok(Reply::Done));
        }
    }
}

fn watch(fd: BorrowedFd<'_>, flags: PollFlags) -> PollFd<'_> {
    PollFd::new(fd, flags)
}
