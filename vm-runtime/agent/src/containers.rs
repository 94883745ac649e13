//! The pod's containers: start, output, end.

use std::fs::OpenOptions;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

use guest_agent::protocol::message::{
    Blob, Configuration, Container as Spec, ContainerState, Event, Failure, FailureKind,
    OUTPUT_WINDOW, Stream,
};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};

use crate::cgroups::Cgroup;
use crate::disks::{self, Root};
use crate::launch::{Launch, Namespaces, Place, Stdio};
use crate::outbox::Outbox;
use crate::streams::{Chunk, Output};

/// One container, from its configuration on.
pub(crate) struct Container {
    pub(crate) spec: Spec,
    running: Option<Running>,
    exit: Option<i32>,
    reported: bool,
}

/// What a started container has, kept after its end for the last of its output.
struct Running {
    pid: Pid,
    root: Root,
    cgroup: Cgroup,
    namespaces: Namespaces,
    outputs: [Output; 2],
}

/// What an exec needs of a container.
pub(crate) struct Entrance<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) root: &'a Root,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) namespaces: &'a Namespaces,
}

/// A [`Failure`] of class System.
pub(crate) fn failed(error: impl Into<anyhow::Error>) -> Failure {
    Failure {
        kind: FailureKind::System,
        message: format!("{:#}", error.into()),
    }
}

impl Container {
    pub(crate) fn new(spec: Spec) -> Self {
        Self {
            spec,
            running: None,
            exit: None,
            reported: false,
        }
    }

    /// Starts it. Returns the pid of its first process.
    pub(crate) fn start(&mut self, pod: &Configuration) -> Result<Pid, Failure> {
        let storage = pod.storage.iter().find(|s| s.container == self.spec.name);
        let layer = storage.and_then(|storage| storage.layer.as_deref());
        let root = disks::prepare_root(&self.spec.name, &self.spec.disk, layer).map_err(failed)?;
        let mounts = storage.map_or(&[][..], |storage| &storage.mounts);
        let volumes = disks::prepare_volumes(mounts).map_err(failed)?;
        let cgroup = Cgroup::create(&self.spec).map_err(failed)?;
        let null = OpenOptions::new()
            .read(true)
            .open("/dev/null")
            .map_err(failed)?;
        let (out, out_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (err, err_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let outputs = [
            Output::new(out).map_err(failed)?,
            Output::new(err).map_err(failed)?,
        ];
        let addresses: Vec<IpAddr> = pod
            .interfaces
            .iter()
            .flat_map(|i| i.addresses.iter().map(|(address, _)| *address))
            .collect();
        let mut env = vec![("HOSTNAME".to_owned(), pod.hostname.clone())];
        env.extend(self.spec.env.iter().cloned());
        let (pid, namespaces) = Launch {
            place: Place::New {
                root: &root,
                volumes: &volumes,
                hostname: &pod.hostname,
                addresses: &addresses,
                dns: &pod.dns,
            },
            cgroup: &cgroup,
            argv: &self.spec.argv,
            env,
            working_dir: &self.spec.working_dir,
            user: &self.spec.user,
            stdio: Stdio::Pipes([OwnedFd::from(null), out_end, err_end]),
        }
        .run()?;
        self.running = Some(Running {
            pid,
            root,
            cgroup,
            namespaces,
            outputs,
        });
        Ok(pid)
    }

    pub(crate) fn state(&self) -> ContainerState {
        match (&self.running, self.exit) {
            (_, Some(code)) => ContainerState::Exited { code },
            (Some(running), None) => ContainerState::Running {
                pid: running.pid.as_raw(),
            },
            (None, None) => ContainerState::Waiting,
        }
    }

    /// Its cgroup, once it has been started.
    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.running.as_ref().map(|r| &r.cgroup)
    }

    /// The way in, while it runs.
    pub(crate) fn entrance(&self) -> Option<Entrance<'_>> {
        let running = self.running.as_ref().filter(|_| self.exit.is_none())?;
        Some(Entrance {
            spec: &self.spec,
            root: &running.root,
            cgroup: &running.cgroup,
            namespaces: &running.namespaces,
        })
    }

    /// Sends a signal to the first process. False if it does not run.
    pub(crate) fn signal(&self, signal: Signal) -> bool {
        let running = self.running.as_ref().filter(|_| self.exit.is_none());
        running.is_some_and(|r| kill(r.pid, signal).is_ok())
    }

    /// Notes the end of the first process, if `pid` is it.
    pub(crate) fn reaped(&mut self, pid: Pid, code: i32) -> bool {
        let ours = self.exit.is_none() && self.running.as_ref().is_some_and(|r| r.pid == pid);
        if ours {
            self.exit = Some(code);
        }
        ours
    }

    /// Takes its root apart, so that the disk below can be unmounted. After its end.
    pub(crate) fn let_go(&mut self) {
        if let Some(Running {
            root, namespaces, ..
        }) = self.running.take()
        {
            // An open namespace keeps its mounts.
            drop(namespaces);
            disks::let_go(&root);
        }
    }

    /// Whether its end has been told, or it never began.
    pub(crate) fn is_over(&self) -> bool {
        self.running.is_none() || self.reported
    }

    /// The outputs that are to be polled: not ended, and with room in their windows.
    pub(crate) fn readable(&mut self, released: u64) -> Vec<(Stream, BorrowedFd<'_>)> {
        let outputs = self.running.iter_mut().flat_map(|r| &mut r.outputs);
        [Stream::Stdout, Stream::Stderr]
            .into_iter()
            .zip(outputs)
            .filter_map(|(stream, output)| {
                let room = output.outstanding(released) < OUTPUT_WINDOW;
                output.fd().filter(|_| room).map(|fd| (stream, fd))
            })
            .collect()
    }

    /// Moves what one output has to the host, as far as its window goes.
    pub(crate) fn pump(&mut self, stream: Stream, outbox: &mut Outbox) {
        let name = self.spec.name.clone();
        let Some(output) = self.output(stream) else {
            return;
        };
        loop {
            let room = OUTPUT_WINDOW.saturating_sub(output.outstanding(outbox.released()));
            let Chunk::Data(offset, data) = output.read(room) else {
                return;
            };
            let bytes = data.len() as u64;
            let ordinal = outbox.event(Event::Output {
                container: name.clone(),
                stream,
                offset,
                data: Blob(data),
            });
            output.sent(ordinal, bytes);
        }
    }

    /// After the end: moves the last output, and once there is no more, tells the end. True then, once.
    pub(crate) fn finish(&mut self, outbox: &mut Outbox) -> bool {
        let (Some(code), false) = (self.exit, self.reported) else {
            return false;
        };
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.pump(stream, outbox);
        }
        let released = outbox.released();
        let mut outputs = self.running.iter_mut().flat_map(|r| &mut r.outputs);
        if outputs.any(|o| o.fd().is_some() && o.outstanding(released) >= OUTPUT_WINDOW) {
            // There may be more behind a full window.
            return false;
        }
        if let Some(running) = &mut self.running {
            running.outputs.iter_mut().for_each(Output::close);
        }
        self.reported = true;
        outbox.event(Event::ContainerExited {
            container: self.spec.name.clone(),
            code,
        });
        true
    }

    fn output(&mut self, stream: Stream) -> Option<&mut Output> {
        let [stdout, stderr] = &mut self.running.as_mut()?.outputs;
        Some(match stream {
            Stream::Stdout => stdout,
            Stream::Stderr => stderr,
        })
    }
}
