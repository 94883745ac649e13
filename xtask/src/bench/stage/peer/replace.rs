//! A new VMM for a running guest on the same node, as QEMU does it alone: through a file, and by cpr-transfer.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::{Value, json};
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::timeout;
use vm_runtime::qmp::{Qmp, QmpEvent};

use super::args::{self, Incoming};
use super::course::ms;
use super::qemu::Qemu;
use super::{How, Peer, UNLIMITED};
use crate::bench::stage::{MOVES_WITHIN, Moved};

impl Peer {
    /// Stops the guest, saves it with its RAM to a file, ends QEMU, starts another, loads, goes on.
    ///
    /// # Errors
    /// A step fails. The guest is gone then.
    pub(in crate::bench) fn replace_by_file(&mut self) -> Result<Moved> {
        let old = self.take()?;
        let (_file, path) = state_file()?;
        let uri = json!({ "uri": format!("file:{path}") });
        self.set_up(&old, How::default(), UNLIMITED, "")?;
        let mut events = old.qmp()?.events();
        old.execute("stop", Value::Null)?;
        let stopped_at = self.awaits(&old, &mut events, |event| at(event, "STOP"))?;
        old.execute("migrate", uri.clone())?;
        self.awaits(&old, &mut events, migrated)?;
        let (node, tap) = (old.node, old.tap);
        drop(old);
        let mut new = self.spawn(node, tap, Incoming::Defer)?;
        new.connect()?;
        self.set_up(&new, How::default(), UNLIMITED, "")?;
        let mut events = new.qmp()?.events();
        new.execute("migrate-incoming", uri)?;
        self.awaits(&new, &mut events, migrated)?;
        // What was stopped when it was saved is stopped when it was loaded.
        new.execute("cont", Value::Null)?;
        let resumed_at = self.awaits(&new, &mut events, |event| at(event, "RESUME"))?;
        self.goes_on(new)?;
        Ok(Moved::on_the_spot(stopped_at, ms(stopped_at, resumed_at)))
    }

    /// Hands the guest over to another QEMU by cpr-transfer (QEMU 10 and later).
    ///
    /// # Errors
    /// A step fails. The guest is gone then.
    pub(in crate::bench) fn replace_by_cpr(&mut self) -> Result<Moved> {
        let old = self.take()?;
        let dir = self.ground.dir();
        let (main, cpr) = (socket(&dir, "main.sock"), socket(&dir, "cpr.sock"));
        let incoming = Incoming::Cpr {
            main: &main,
            cpr: &cpr,
        };
        self.set_up(&old, How::default(), UNLIMITED, "")?;
        old.execute("migrate-set-parameters", json!({ "mode": "cpr-transfer" }))?;
        let mut stops = old.qmp()?.events();
        // The old one keeps its TAP until it ends, so the new one has the other.
        let mut new = self.spawn(old.node, 1 - old.tap, incoming)?;
        await_socket(&mut new, Path::new(&cpr))?;
        let channels = json!([
            { "channel-type": "main", "addr": args::unix(&main) },
            { "channel-type": "cpr", "addr": args::unix(&cpr) },
        ]);
        // The new one answers at its monitor only when it has been told of the old one's descriptors.
        let arguments = json!({ "channels": channels });
        let begin = old.qmp()?.execute("migrate", arguments, MOVES_WITHIN);
        let monitor = new.monitor();
        let connect = async {
            let monitor = Qmp::connect(&monitor, MOVES_WITHIN).await?;
            // At once, so that no event is missed.
            let events = monitor.events();
            anyhow::Ok((monitor, events))
        };
        let runtime = &self.ground.runtime;
        let (begun, connected) = runtime.block_on(async { tokio::join!(begin, connect) });
        begun.with_context(|| old.last_words())?;
        let (monitor, mut events) = connected.with_context(|| new.last_words())?;
        new.adopt(monitor);
        let stopped_at = self.awaits(&old, &mut stops, |event| at(event, "STOP"))?;
        let resumed_at = self.awaits(&new, &mut events, |event| at(event, "RESUME"))?;
        drop(old);
        self.goes_on(new)?;
        Ok(Moved::on_the_spot(stopped_at, ms(stopped_at, resumed_at)))
    }

    fn goes_on(&mut self, mut new: Qemu) -> Result<()> {
        self.load.report().with_context(|| new.last_words())?;
        if !new.is_alive() {
            bail!("{}", new.last_words());
        }
        self.running = Some(new);
        Ok(())
    }

    /// Waits for an event of one QEMU.
    fn awaits<T>(
        &self,
        qemu: &Qemu,
        events: &mut Receiver<QmpEvent>,
        found: impl Fn(&QmpEvent) -> Option<Result<T>>,
    ) -> Result<T> {
        let search = async {
            loop {
                match events.recv().await {
                    Ok(event) => {
                        if let Some(found) = found(&event) {
                            return found;
                        }
                    }
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => bail!("QEMU died"),
                }
            }
        };
        let runtime = &self.ground.runtime;
        runtime
            .block_on(async { timeout(MOVES_WITHIN, search).await })
            .with_context(|| format!("not over after {MOVES_WITHIN:?}"))
            .flatten()
            .with_context(|| qemu.last_words())
    }
}

/// When an event of this name happened, if it is one.
fn at(event: &QmpEvent, name: &str) -> Option<Result<u64>> {
    (event.name == name).then_some(Ok(event.at_unix_us))
}

/// The end of a save or a load, if the event tells of it.
fn migrated(event: &QmpEvent) -> Option<Result<()>> {
    if event.name != "MIGRATION" {
        return None;
    }
    match event.data["status"].as_str() {
        Some("completed") => Some(Ok(())),
        Some(status @ ("failed" | "cancelled")) => Some(Err(anyhow::anyhow!("it is {status}"))),
        Some(_) | None => None,
    }
}

/// The path of a socket that is not there yet.
fn socket(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    let _ = std::fs::remove_file(&path);
    path.to_string_lossy().into_owned()
}

/// Waits until a QEMU that was just started listens.
fn await_socket(qemu: &mut Qemu, path: &Path) -> Result<()> {
    let mut alive = true;
    let there = crate::process::poll_until(super::SOON, || {
        alive = qemu.is_alive();
        path.exists() || !alive
    });
    if !there || !alive {
        bail!("the new QEMU does not listen: {}", qemu.last_words());
    }
    Ok(())
}

/// A file in memory, the kindest place for a state that is read again at once; it vanishes with this process.
fn state_file() -> Result<(OwnedFd, String)> {
    let file = memfd_create("state", MFdFlags::MFD_CLOEXEC).context("cannot make a memfd")?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Ok((file, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_migration_ends_the_wait() {
        let event = |status: &str| QmpEvent {
            name: "MIGRATION".to_owned(),
            data: json!({ "status": status }),
            at_unix_us: 5,
        };
        assert!(migrated(&event("active")).is_none());
        assert!(migrated(&event("completed")).unwrap().is_ok());
        assert!(migrated(&event("failed")).unwrap().is_err());
        assert!(at(&event("active"), "STOP").is_none());
        assert_eq!(at(&event("active"), "MIGRATION").unwrap().unwrap(), 5);
    }
}
