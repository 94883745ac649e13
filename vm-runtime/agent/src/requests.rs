//! Requests, each answered once however often it comes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use guest_agent::protocol::message::{
    ExecId, ExecSpec, Failure, FailureKind, Reply, Request, RequestId,
};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::Signal;

use crate::containers::{Container, failed};
use crate::execs::Exec;
use crate::identity::{self, set_clock};
use crate::server::Agent;
use crate::stats;

/// How many answers are remembered.
const REMEMBERED: usize = 128;

/// Answers by id, so that a request that comes again is not carried out again.
#[derive(Default)]
pub(crate) struct Answers {
    /// `None` while it is being carried out.
    known: VecDeque<(RequestId, Option<Result<Reply, Failure>>)>,
}

impl Answers {
    fn get(&self, id: RequestId) -> Option<&Option<Result<Reply, Failure>>> {
        self.known.iter().find(|(k, _)| *k == id).map(|(_, a)| a)
    }

    fn set(&mut self, id: RequestId, answer: Option<Result<Reply, Failure>>) {
        self.known.retain(|(k, _)| *k != id);
        self.known.push_back((id, answer));
        if self.known.len() > REMEMBERED {
            self.known.pop_front();
        }
    }
}

impl Agent {
    /// Carries a request out, or repeats the answer it had.
    pub(crate) fn request(&mut self, id: RequestId, request: Request) {
        match self.answers.get(id) {
            Some(None) => return,
            Some(Some(answer)) => {
                let answer = answer.clone();
                self.outbox.reply(id, answer);
                return;
            }
            None => self.answers.set(id, None),
        }
        let done = |result: Result<(), Failure>| Some(result.map(|()| Reply::Done));
        let answer = match request {
            Request::Configure(wanted) => done(self.pod.configure(*wanted)),
            Request::StartPod => done(self.pod.start(&mut self.outbox)),
            Request::Exec(spec) => Some(self.exec(id, &spec)),
            Request::Signal { container, signal } => done(self.signal(&container, signal)),
            Request::StopPod { grace_ms } => {
                self.pod
                    .stop(id, Duration::from_millis(grace_ms), Instant::now());
                None
            }
            Request::SetClock { unix_ns } => done(set_clock(unix_ns).map_err(failed)),
            Request::Stats => Some(Ok(Reply::Stats(self.stats()))),
            Request::Status => Some(Ok(Reply::Status(self.pod.status()))),
            Request::Conditions => Some(Ok(Reply::Conditions(self.pod.conditions()))),
            Request::PowerOff => {
                let refused = reboot(RebootMode::RB_POWER_OFF).map(|never| match never {});
                done(refused.map_err(failed))
            }
            Request::Settle => done(identity::settle().map_err(failed)),
            Request::Identify(identity) => done(self.pod.identify(&identity)),
        };
        if let Some(answer) = answer {
            self.answer(id, answer);
        }
    }

    /// Sends an answer and remembers it.
    pub(crate) fn answer(&mut self, id: RequestId, answer: Result<Reply, Failure>) {
        self.answers.set(id, Some(answer.clone()));
        self.outbox.reply(id, answer);
    }

    fn exec(&mut self, id: ExecId, spec: &ExecSpec) -> Result<Reply, Failure> {
        let container = self.pod.container(&spec.container)?;
        let entrance = container.entrance().ok_or_else(|| not_running(container))?;
        let exec = Exec::start(id, spec, &entrance)?;
        self.execs.insert(id, exec);
        Ok(Reply::ExecStarted)
    }

    fn signal(&mut self, name: &str, number: i32) -> Result<(), Failure> {
        let container = self.pod.container(name)?;
        let signal = Signal::try_from(number).map_err(|_| Failure {
            kind: FailureKind::Invalid,
            message: format!("{number} is not the number of a signal"),
        })?;
        match container.signal(signal) {
            true => Ok(()),
            false => Err(not_running(container)),
        }
    }

    fn stats(&self) -> guest_agent::protocol::message::Stats {
        let containers = self.pod.containers.iter();
        stats::collect(
            containers
                .filter_map(|c| c.cgroup().map(|g| g.stats(&c.spec.name)))
                .collect(),
        )
    }
}

fn not_running(container: &Container) -> Failure {
    Failure {
        kind: FailureKind::NoContainer,
        message: format!("the container `{}` does not run", container.spec.name),
    }
}
