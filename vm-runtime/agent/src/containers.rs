//! The pod's containers: start, output, end. What comes of an end is in [`crate::life`], what probes do in [`crate::care`].

use std::fs::{self, File, OpenOptions};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use guest_agent::protocol::message::{
    Blob, Configuration, Container as Spec, ContainerState, Event, Failure, FailureKind,
    OUTPUT_WINDOW, Storage, Stream,
};
use guest_agent::protocol::settings::{Condition, ContainerSettings, Restart};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};

use crate::cgroups::Cgroup;
use crate::disks::{self, Root};
use crate::launch::{Launch, Namespaces, Place, Program, Stdio};
use crate::life::Life;
use crate::outbox::Outbox;
use crate::probes::Health;
use crate::rights::Rights;
use crate::streams::{Chunk, Output};
use crate::{checks, execs};

/// The exit code of a process that SIGKILL ended.
const KILLED: i32 = 128 + Signal::SIGKILL as i32;

/// A terminal's size before anybody has said how large it is: what VT100s had.
const TERMINAL: (u16, u16) = (24, 80);

/// One container, from its configuration on.
pub(crate) struct Container {
    pub(crate) spec: Spec,
    pub(crate) settings: ContainerSettings,
    rights: Rights,
    running: Option<Running>,
    exit: Option<i32>,
    reported: bool,
    /// Of all its runs, one after the other.
    outputs: [Output; 2],
    pub(crate) life: Life,
    /// Its probes, while it runs.
    pub(crate) health: Option<Health>,
    /// What it was asked to end by, and when it is made to.
    pub(crate) kill_at: Option<Instant>,
    /// The process of `preStop`, after which it is asked to end.
    pub(crate) pre_stop: Option<Pid>,
}

/// What a started container has, kept after its end for the last of its output.
struct Running {
    pid: Pid,
    root: Root,
    cgroup: Cgroup,
    namespaces: Namespaces,
    env: Vec<(String, String)>,
    /// Processes that were killed for want of memory before this run.
    oom_kills: u64,
    /// Nobody writes to it: it is there so that it has no end.
    _stdin: Option<File>,
}

/// First process, cgroup, namespaces, environment, and the held end of its input.
type Launched = (Pid, Cgroup, Namespaces, Vec<(String, String)>, Option<File>);

/// What another process in a container needs of it.
pub(crate) struct Entrance<'a> {
    pub(crate) spec: &'a Spec,
    pub(crate) root: &'a Root,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) env: &'a [(String, String)],
    pub(crate) rights: &'a Rights,
}

/// The three standard streams of a container's first process, and the agent's ends of them.
struct Streams {
    stdio: Stdio,
    outputs: [Output; 2],
    stdin: Option<File>,
}

impl Streams {
    fn terminal(root: &Root) -> Result<Self, Failure> {
        let (master, slave) = execs::open_terminal(root, TERMINAL.0, TERMINAL.1)?;
        let stdin = master.try_clone().map_err(failed)?;
        let output = Output::new(OwnedFd::from(master)).map_err(failed)?;
        Ok(Self {
            stdio: Stdio::Terminal(slave),
            outputs: [output, Output::none()],
            stdin: Some(stdin),
        })
    }

    fn pipes(stdin: bool) -> Result<Self, Failure> {
        let (input, held) = match stdin {
            true => {
                let (end, held) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
                (end, Some(File::from(held)))
            }
            false => {
                let null = OpenOptions::new().read(true).open("/dev/null");
                (OwnedFd::from(null.map_err(failed)?), None)
            }
        };
        let (out, out_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (err, err_end) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let output = |fd| Output::new(fd).map_err(failed);
        Ok(Self {
            stdio: Stdio::Pipes([input, out_end, err_end]),
            outputs: [output(out)?, output(err)?],
            stdin: held,
        })
    }
}

/// A [`Failure`] of class System.
pub(crate) fn failed(error: impl Into<anyhow::Error>) -> Failure {
    Failure {
        kind: FailureKind::System,
        message: format!("{:#}", error.into()),
    }
}

impl Container {
    pub(crate) fn new(
        spec: Spec,
        settings: ContainerSettings,
        (out, err): (u64, u64),
        pod: &Configuration,
    ) -> Self {
        Self {
            rights: Rights::new(&pod.settings, &settings),
            spec,
            settings,
            running: None,
            exit: None,
            reported: false,
            outputs: [Output::after(out), Output::after(err)],
            life: Life::default(),
            health: None,
            kill_at: None,
            pre_stop: None,
        }
    }

    /// Starts it, also once more after its end. Returns the pid of its first process.
    pub(crate) fn start(&mut self, pod: &Configuration, now: Instant) -> Result<Pid, Failure> {
        let storage = pod.storage.iter().find(|s| s.container == self.spec.name);
        let layer = storage.and_then(|storage| storage.layer.as_deref());
        if let Some(Running { root, .. }) = self.running.take() {
            self.put_away(layer, root)?;
        }
        let root = disks::prepare_root(&self.spec.name, &self.spec.disk, layer).map_err(failed)?;
        let started = self.start_on(root, pod, storage);
        let pid = started.or_else(|(failure, root)| {
            // The next time begins with the image as it is, too.
            self.put_away(layer, root).and(Err(failure))
        })?;
        (self.exit, self.reported, self.kill_at) = (None, false, None);
        let health = Health::new(&self.settings, now);
        self.life.started(health.begins_ready(), now);
        self.health = Some(health);
        Ok(pid)
    }

    /// Takes away what a run has written outside of volumes.
    fn put_away(&self, layer: Option<&str>, root: Root) -> Result<(), Failure> {
        let old = disks::put_away(&self.spec.name, layer, root).map_err(failed)?;
        // Beside the agent, which serves others meanwhile; what is left is in nobody's way.
        checks::helper(move || fs::remove_dir_all(old).is_ok()).ok();
        Ok(())
    }

    /// Runs it on a root that is mounted. Gives the root back if that fails.
    fn start_on(
        &mut self,
        root: Root,
        pod: &Configuration,
        storage: Option<&Storage>,
    ) -> Result<Pid, (Failure, Root)> {
        let launched = self.launch(&root, pod, storage);
        let (pid, cgroup, namespaces, env, stdin) = match launched {
            Ok(parts) => parts,
            Err(failure) => return Err((failure, root)),
        };
        self.running = Some(Running {
            pid,
            root,
            oom_kills: cgroup.oom_kills(),
            cgroup,
            namespaces,
            env,
            _stdin: stdin,
        });
        Ok(pid)
    }

    fn launch(
        &mut self,
        root: &Root,
        pod: &Configuration,
        storage: Option<&Storage>,
    ) -> Result<Launched, Failure> {
        let mounts = storage.map_or(&[][..], |storage| &storage.mounts);
        let group = pod.settings.fs_group;
        let mut volumes = disks::prepare_volumes(mounts, group).map_err(failed)?;
        let (all, mounts) = (&pod.settings.memory_volumes, &self.settings.memory_mounts);
        volumes.extend(disks::prepare_memory(all, mounts, group).map_err(failed)?);
        let cgroup = Cgroup::of(&self.spec).map_err(failed)?;
        let streams = match self.settings.tty {
            true => Streams::terminal(root)?,
            false => Streams::pipes(self.settings.stdin)?,
        };
        // Its log goes on where it was.
        for (written, output) in self.outputs.iter_mut().zip(streams.outputs) {
            written.goes_on(output);
        }
        let mut env = vec![("HOSTNAME".to_owned(), pod.hostname.clone())];
        if self.settings.tty {
            env.push(("TERM".to_owned(), "xterm".to_owned()));
        }
        env.extend(self.spec.env.iter().cloned());
        let (pid, namespaces) = Launch {
            place: Place::New {
                root,
                volumes: &volumes,
                pod,
                read_only: self.settings.read_only_root,
            },
            cgroup: &cgroup,
            program: Program {
                argv: self.spec.argv.clone(),
                env: env.clone(),
                working_dir: self.spec.working_dir.clone(),
                user: self.spec.user.clone(),
                rights: self.rights.clone(),
            },
            stdio: streams.stdio,
        }
        .run()?;
        root.devices.taken();
        Ok((pid, cgroup, namespaces, env, streams.stdin))
    }

    /// As the host is told.
    pub(crate) fn condition(&self, now: Instant) -> Condition {
        self.life.condition(&self.spec.name, now)
    }

    /// Tells the host how it fares, if that understands it.
    pub(crate) fn tell(&self, outbox: &mut Outbox, now: Instant) {
        outbox.condition(self.condition(now));
    }

    pub(crate) fn state(&self) -> ContainerState {
        if self.life.again_at().is_some() {
            return ContainerState::Waiting;
        }
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
            env: &running.env,
            rights: &self.rights,
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
        if let Some(Running { root, .. }) = self.running.take() {
            disks::let_go(root);
        }
    }

    /// Whether its end has been told, or it never began.
    pub(crate) fn is_over(&self) -> bool {
        self.running.is_none() || self.reported
    }

    /// The outputs that are to be polled: not ended, and with room in their windows.
    pub(crate) fn readable(&mut self, released: u64) -> Vec<(Stream, BorrowedFd<'_>)> {
        [Stream::Stdout, Stream::Stderr]
            .into_iter()
            .zip(&mut self.outputs)
            .filter_map(|(stream, output)| {
                let room = output.outstanding(released) < OUTPUT_WINDOW;
                output.fd().filter(|_| room).map(|fd| (stream, fd))
            })
            .collect()
    }

    /// Moves what one output has to the host, as far as its window goes.
    pub(crate) fn pump(&mut self, stream: Stream, outbox: &mut Outbox) {
        let name = self.spec.name.clone();
        let output = match stream {
            Stream::Stdout => &mut self.outputs[0],
            Stream::Stderr => &mut self.outputs[1],
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

    /// After the end: moves the last output, and once there is no more, tells the end, and whether it is started again, which it is
    /// not if the pod is `stopping`. True then, once.
    pub(crate) fn finish(&mut self, outbox: &mut Outbox, stopping: bool, now: Instant) -> bool {
        let (Some(code), false) = (self.exit, self.reported) else {
            return false;
        };
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.pump(stream, outbox);
        }
        let released = outbox.released();
        let mut outputs = self.outputs.iter_mut();
        if outputs.any(|o| o.fd().is_some() && o.outstanding(released) >= OUTPUT_WINDOW) {
            // There may be more behind a full window.
            return false;
        }
        let mut oom = false;
        self.outputs.iter_mut().for_each(Output::close);
        if let Some(running) = &self.running {
            oom = code == KILLED && running.cgroup.oom_kills() > running.oom_kills;
        }
        self.reported = true;
        (self.health, self.kill_at, self.pre_stop) = (None, None, None);
        outbox.event(Event::ContainerExited {
            container: self.spec.name.clone(),
            code,
        });
        let policy = match stopping {
            true => Restart::Never,
            false => self.settings.restart,
        };
        self.life.ended(policy, code, oom, now);
        self.tell(outbox, now);
        true
    }
}
