//! From an idle guest to one whose containers run, without a pause for the host's next word.

use guest_agent::protocol::message::{Configuration, Identity, Reply, Request};
use tokio::sync::oneshot;

use super::actor::{Answer, Command};
use super::{ANSWER_LIMIT, AgentClient, AgentError, RequestId, wait};

type Pending = oneshot::Receiver<Result<(RequestId, Reply), AgentError>>;

/// What a guest was asked to become: it does one after the other, and each only if those before it have succeeded.
#[derive(Debug)]
pub struct Beginning {
    identified: Option<Pending>,
    configured: Option<Pending>,
    started: Option<Pending>,
}

impl AgentClient {
    /// Asks a guest to take an identity of its own, if it was started from a template; to set up network, mounts and limits; and to
    /// start its containers in order. The answers come in that order, too.
    ///
    /// # Errors
    /// [`AgentError::Gone`]; all others come as answers.
    pub fn begin(
        &self,
        identity: Option<Identity>,
        configuration: Configuration,
    ) -> Result<Beginning, AgentError> {
        let ask = |request| {
            let (reply, answer): (Answer, Pending) = oneshot::channel();
            self.send(Command::Request { request, reply })?;
            Ok::<_, AgentError>(answer)
        };
        let identified = identity.map(Request::Identify).map(ask).transpose()?;
        Ok(Beginning {
            identified,
            configured: Some(ask(Request::Configure(Box::new(configuration)))?),
            started: Some(ask(Request::StartPod)?),
        })
    }
}

impl Beginning {
    /// Its identity is its own.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` when it is configured already, or its kernel refuses something. It does nothing further then.
    pub async fn identified(&mut self) -> Result<(), AgentError> {
        done(self.identified.take()).await
    }

    /// Network, mounts and limits are there.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` when the guest is configured otherwise or its kernel refuses something.
    pub async fn configured(&mut self) -> Result<(), AgentError> {
        done(self.configured.take()).await
    }

    /// Each container's program runs.
    ///
    /// # Errors
    /// [`AgentError`]; `Refused` names the container that did not start. Those before it run.
    pub async fn started(&mut self) -> Result<(), AgentError> {
        done(self.started.take()).await
    }
}

/// What was not asked, or is answered already, is done.
async fn done(pending: Option<Pending>) -> Result<(), AgentError> {
    let Some(pending) = pending else {
        return Ok(());
    };
    match wait(pending, ANSWER_LIMIT).await? {
        (_, Reply::Done) => Ok(()),
        (_, Reply::ExecStarted | Reply::Stats(_) | Reply::Status(_) | Reply::Conditions(_)) => {
            Err(AgentError::Confused)
        }
    }
}
