//! Finding a VM again in its folder, whatever the service before was doing when it was killed.
//!
//! | the VMM whose record decides | one that was to replace it | found |
//! |---|---|---|
//! | answers | any | the first; the other one is killed |
//! | is suspended, silent or gone | has the state | the other one; the first is killed |
//! | is suspended | waits for the state, or is gone | none; both are killed |
//! | is silent or gone | waits for the state, or is gone | none; the other one is killed, the first left as it is |
//! | is silent or gone | there is none | none; the first is left as it is |
//!
//! Nobody suspends a VMM that is to be replaced before the other one has its state, and nobody lets the other one run before
//! that: so at most one of them has run since the state was taken.

use std::io;
use std::path::Path;

use super::process::is_suspended;
use super::record::VmRecord;
use super::replace_fd::replace_fd;
use super::{AttachError, RunState, Vm};

impl Vm {
    /// Finds the VM of a folder again, in whatever state it is; one of two that were left by an upgrade which was cut short.
    ///
    /// # Errors
    /// As [`Vm::attach`]; or the other one of two cannot be ended.
    pub async fn find(home: &Path) -> Result<Self, AttachError> {
        let found = match VmRecord::load(home) {
            Ok(record) => Self::of_two(&record).await,
            Err(_) => Err(AttachError::Gone { pid: 0 }),
        };
        VmRecord::kill_others(home).await.map_err(others)?;
        found
    }

    /// The one of this record, or the one that was to replace it.
    async fn of_two(record: &VmRecord) -> Result<Self, AttachError> {
        let Some(next) = record.successor() else {
            return Self::attach(record).await;
        };
        let suspended = is_suspended(record.pid);
        let error = match suspended {
            true => AttachError::Gone { pid: record.pid },
            false => match Self::attach(record).await {
                Ok(vm) => return Ok(vm),
                Err(error) => error,
            },
        };
        let next = match Self::attach(&next).await {
            Ok(next) if next.has_state().await => Some(next),
            Ok(_) | Err(_) => None,
        };
        if suspended || next.is_some() {
            // What it knows of the guest may not be true any more.
            record.process().kill().await.map_err(others)?;
        }
        let next = next.ok_or(error)?;
        next.finish_succession().await.map_err(others)?;
        Ok(next)
    }

    /// Whether it has the state of the one that it was to replace.
    async fn has_state(&self) -> bool {
        match self.query_status().await {
            Ok(RunState::Incoming) | Err(_) => false,
            Ok(
                RunState::Running
                | RunState::Paused
                | RunState::Saved
                | RunState::Saving
                | RunState::Other(_),
            ) => true,
        }
    }

    /// What the service that was killed may not have come to.
    async fn finish_succession(&self) -> io::Result<()> {
        self.take_tap().await?;
        self.record.decide()
    }

    /// Puts the guest's TAP in the place of the one that QEMU began with. Again is no error.
    pub(super) async fn take_tap(&self) -> io::Result<()> {
        let (pid, fds) = (self.record.pid, self.record.fds);
        let Some(netdev) = fds.netdev else {
            return Ok(());
        };
        let replace = move || replace_fd(pid, fds.tap, netdev);
        let done = tokio::task::spawn_blocking(replace).await;
        done.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

fn others(source: io::Error) -> AttachError {
    AttachError::Others { source }
}
