//! From a fork to a running program: what the child does, and how the agent learns whether it worked.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use guest_agent::protocol::message::{Configuration, Failure, FailureKind};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{
    Gid, Pid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, fchown, pipe2, setsid,
};
use serde::{Deserialize, Serialize};

use crate::cgroups::Cgroup;
use crate::disks::{Root, Volume};
use crate::first::{self, Home, Order, Things};
use crate::rights::Rights;
use crate::users::Identity;
use crate::{rootfs, sys};

/// Looked through when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The child's three standard descriptors.
pub(crate) enum Stdio {
    /// Three pipes, or files.
    Pipes([OwnedFd; 3]),
    /// A terminal's slave side, which becomes the controlling terminal.
    Terminal(OwnedFd),
}

/// Where the child lives.
pub(crate) enum Place<'a> {
    /// In new namespaces, on this root.
    New {
        root: &'a Root,
        volumes: &'a [Volume],
        pod: &'a Configuration,
        read_only: bool,
    },
    /// In those of a container, by its first process.
    Join(&'a Namespaces),
}

/// The namespaces of a container's first process, by its pidfd: while it runs they can be joined.
#[derive(Debug)]
pub(crate) struct Namespaces(OwnedFd);

/// A program to run.
pub(crate) struct Launch<'a> {
    pub(crate) place: Place<'a>,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) program: Program,
    pub(crate) stdio: Stdio,
}

/// What is run, and as whom.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) working_dir: String,
    pub(crate) user: String,
    pub(crate) rights: Rights,
}

impl Launch<'_> {
    /// Starts it, and returns when the program itself runs, or why it does not.
    pub(crate) fn run(self) -> Result<(Pid, Namespaces), Failure> {
        let (mut report, tell) = pipe2(OFlag::O_CLOEXEC)
            .map(|(r, w)| (File::from(r), w))
            .map_err(|e| system("making a pipe", e))?;
        let started = self.start(tell);
        let (pid, pidfd) = started.map_err(|e| system("starting a process", format!("{e:#}")))?;
        // Ends at exec, which closes the other end, or with the child.
        let mut bytes = Vec::new();
        report.read_to_end(&mut bytes).ok();
        if bytes.is_empty() {
            return Ok((pid, Namespaces(pidfd)));
        }
        Err(postcard::from_bytes(&bytes)
            .unwrap_or_else(|_| system("starting a process", "it died")))
    }

    fn start(self, tell: OwnedFd) -> Result<(Pid, OwnedFd)> {
        let cgroup = self.cgroup.dir().as_fd();
        let (program, stdio) = (self.program, self.stdio);
        match self.place {
            Place::New {
                root,
                volumes,
                pod,
                read_only,
            } => {
                let order = Order {
                    home: Home::new(pod, volumes, read_only),
                    program,
                };
                let things = Things {
                    mounts: first::mounts(root, volumes)?,
                    stdio,
                    tell,
                };
                // One that has ended in the meantime is replaced.
                if let Some(waiting) = root.devices.waiting()
                    && let Ok(child) = waiting.tell(&order, &things)
                {
                    return Ok(child);
                }
                match first::fork(cgroup)? {
                    Some(child) => Ok(child),
                    None => first::become_program(&root.devices, order, things),
                }
            }
            Place::Join(namespaces) => {
                // A process never changes its own PID namespace, only its children's.
                let own = File::open("/proc/self/ns/pid")?;
                setns(&namespaces.0, CloneFlags::CLONE_NEWPID)?;
                let child = sys::fork_into(0, cgroup);
                if !matches!(child, Ok(None)) {
                    setns(&own, CloneFlags::CLONE_NEWPID)?;
                }
                if let Some(child) = child? {
                    return Ok(child);
                }
                let joined = begin().and_then(|()| {
                    let all = CloneFlags::CLONE_NEWUTS
                        | CloneFlags::CLONE_NEWIPC
                        | CloneFlags::CLONE_NEWNS;
                    setns(&namespaces.0, all).context("joining the container's namespaces")
                });
                program.execute(joined, false, &stdio, tell)
            }
        }
    }
}

/// What every new process does first.
pub(crate) fn begin() -> Result<()> {
    sys::default_signals();
    fs::write("/proc/self/oom_score_adj", "0").ok();
    setsid().map(drop).context("starting a session")
}

impl Program {
    /// Becomes the program, if all went well so far; or tells why not, and ends.
    pub(crate) fn execute(
        self,
        there: Result<()>,
        read_only: bool,
        stdio: &Stdio,
        tell: OwnedFd,
    ) -> ! {
        let argv = self.argv.clone();
        let failure = match there.and_then(|()| self.settle(read_only, stdio)) {
            Ok(env) => Failure {
                kind: FailureKind::NotExecutable,
                message: format!("{:#}", execute(&argv, &env)),
            },
            Err(e) => Failure {
                kind: FailureKind::System,
                message: format!("{e:#}"),
            },
        };
        let bytes = postcard::to_allocvec(&failure).unwrap_or_default();
        File::from(tell).write_all(&bytes).ok();
        sys::exit_now(127);
    }

    /// Everything up to the program itself, on its root. Returns the program's environment.
    fn settle(self, read_only: bool, stdio: &Stdio) -> Result<Vec<(String, String)>> {
        let identity = self.rights.identity(&self.user)?;
        let dir = match self.working_dir.as_str() {
            "" => "/",
            dir => dir,
        };
        fs::create_dir_all(dir).with_context(|| format!("making the working directory {dir}"))?;
        chdir(dir).with_context(|| format!("entering the working directory {dir}"))?;
        if read_only {
            rootfs::seal()?;
        }
        wire(stdio, &identity)?;
        let env = environment(self.env, &identity);
        self.rights.take(&identity)?;
        Ok(env)
    }
}

fn system(doing: &str, error: impl std::fmt::Display) -> Failure {
    Failure {
        kind: FailureKind::System,
        message: format!("{doing}: {error}"),
    }
}

fn wire(stdio: &Stdio, owner: &Identity) -> Result<()> {
    let [stdin, stdout, stderr] = match stdio {
        Stdio::Pipes([a, b, c]) => [a, b, c],
        Stdio::Terminal(slave) => {
            sys::control_terminal(slave.as_fd()).context("taking the terminal")?;
            [slave, slave, slave]
        }
    };
    for fd in [stdin, stdout, stderr] {
        // So that a program that is not root can open /dev/stdout again. /dev/null cannot be given away.
        fchown(
            fd,
            Some(Uid::from_raw(owner.uid)),
            Some(Gid::from_raw(owner.gid)),
        )
        .ok();
    }
    dup2_stdin(stdin).context("wiring standard input")?;
    dup2_stdout(stdout).context("wiring standard output")?;
    dup2_stderr(stderr).context("wiring standard error")
}

/// The later of two with one name wins; PATH and HOME are there in any case.
fn environment(given: Vec<(String, String)>, identity: &Identity) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = vec![
        ("PATH".into(), DEFAULT_PATH.into()),
        ("HOME".into(), identity.home.clone()),
    ];
    for (key, value) in given {
        match env.iter_mut().find(|(k, _)| *k == key) {
            Some(slot) => slot.1 = value,
            None => env.push((key, value)),
        }
    }
    env
}

/// execve with a search through PATH. Returns why it did not work, for a [`Failure`].
fn execute(argv: &[String], env: &[(String, String)]) -> anyhow::Error {
    let Some(program) = argv.first().filter(|p| !p.is_empty()) else {
        return anyhow::anyhow!("there is no program to run: give the container a command");
    };
    let c = |text: String| CString::new(text).context("an argument or variable with a NUL in it");
    let args = argv.iter().cloned().map(c).collect::<Result<Vec<_>>>();
    let vars = env
        .iter()
        .map(|(k, v)| c(format!("{k}={v}")))
        .collect::<Result<Vec<_>>>();
    let (args, vars) = match (args, vars) {
        (Ok(args), Ok(vars)) => (args, vars),
        (Err(e), _) | (_, Err(e)) => return e,
    };
    let path = env
        .iter()
        .find(|(k, _)| k == "PATH")
        .map_or(DEFAULT_PATH, |(_, v)| v);
    let mut worst = Errno::ENOENT;
    for candidate in candidates(program, path) {
        let Ok(file) = c(candidate.to_string_lossy().into_owned()) else {
            continue;
        };
        let Err(errno) = execve(&file, &args, &vars);
        if errno != Errno::ENOENT && errno != Errno::ENOTDIR {
            worst = errno;
        }
    }
    anyhow::Error::from(worst).context(format!("cannot execute `{program}`"))
}

fn candidates(program: &str, path: &str) -> Vec<PathBuf> {
    if program.contains('/') {
        return vec![program.into()];
    }
    path.split(':')
        .map(|dir| PathBuf::from(if dir.is_empty() { "." } else { dir }).join(program))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_variable_wins_and_the_defaults_are_there() {
        let identity = Identity {
            uid: 0,
            gid: 0,
            groups: vec![],
            home: "/root".into(),
        };
        let given = [("A", "1"), ("HOME", "/h"), ("A", "2")].map(|(k, v)| (k.into(), v.into()));
        let env = environment(given.to_vec(), &identity);
        assert_eq!(
            env.iter().filter(|(k, _)| k == "A").collect::<Vec<_>>(),
            [&("A".into(), "2".into())]
        );
        assert!(env.contains(&("HOME".into(), "/h".into())));
        assert!(env.iter().any(|(k, _)| k == "PATH"));
    }

    #[test]
    fn a_name_is_looked_up_in_path_and_a_path_is_not() {
        assert_eq!(
            candidates("sh", "/a:/b"),
            [PathBuf::from("/a/sh"), "/b/sh".into()]
        );
        assert_eq!(candidates("./sh", "/a"), [PathBuf::from("./sh")]);
    }
}
