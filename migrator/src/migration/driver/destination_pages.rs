//! Post-copy at the destination: what is missing, and where it comes from.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use vm_runtime::vm::VmRam;

use super::destination::Run;
use super::steps::blocking;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::memory::postcopy::Pager;
use crate::memory::receive::Target;
use crate::migration::destination::Input;
use crate::wire::conn::Connection;
use crate::wire::fault::Fault;
use crate::wire::id::MigrationId;
use crate::wire::message::{PageBits, Wanted};

/// How the names of these files end.
pub(super) const SUFFIX: &str = ".missing";

/// A folder in memory, as the guest is.
pub(super) fn spool(node: &Node) -> PathBuf {
    node.config.state_dir.join("spool")
}

/// Where a migration's missing pages are kept.
pub(super) fn missing_file(node: &Node, migration: MigrationId) -> PathBuf {
    spool(node).join(format!("{migration}{SUFFIX}"))
}

impl Run {
    pub(super) fn pager(&self) -> Option<Arc<Pager>> {
        self.target
            .get()
            .and_then(|target| target.pager.get())
            .cloned()
    }

    /// The source says which pages will be missing.
    pub(super) fn take_stale(&mut self, bits: &PageBits) -> Result<(), String> {
        let pages = self.target.get().map_or(0, |target| target.memory.pages());
        if bits.end() > pages.next_multiple_of(64) {
            return Err("the source sends more missing pages than the guest has pages".to_owned());
        }
        self.stale.extend(bits.ranges());
        Ok(())
    }

    pub(super) fn mark_stale(&mut self, last: bool) {
        let ranges = std::mem::take(&mut self.stale);
        let file = missing_file(&self.runner.node, self.machine.migration());
        let (target, faults) = (Arc::clone(&self.target), std::mem::take(&mut self.faults));
        let ram = self
            .vm()
            .ok_or("the VM is gone".to_owned())
            .and_then(|vm| vm.ram().map_err(|e| chain(&e)));
        // The connections' sockets belong to the runtime until they are taken out of it.
        let runtime = tokio::runtime::Handle::current();
        self.runner.step(async move {
            let ram = ram?;
            blocking(move || {
                let _runtime = runtime.enter();
                let pager = begun(&target, &ram, &file, faults)?;
                pager.mark(&ranges).map_err(|error| chain(&error))?;
                if let Some(hashes) = target.get().and_then(|target| target.hashes.as_ref()) {
                    ranges.iter().for_each(|range| hashes.mark(*range));
                }
                Ok(())
            })
            .await?;
            Ok(Input::StaleMarked { last })
        });
    }

    /// Until the guest, which runs, has everything.
    pub(super) fn await_pages(&mut self) {
        let Some(pager) = self.pager() else {
            let faults = Default::default();
            return self.runner.tell(Input::PagesHere { faults });
        };
        pager.resumed();
        self.runner.step(async move {
            pager.complete().await;
            let faults = pager.figures();
            blocking(move || {
                pager.end();
                Ok(())
            })
            .await?;
            Ok(Input::PagesHere { faults })
        });
    }

    /// Says what is missing, and asks for it over the link that is up.
    pub(super) async fn send_wanted(&mut self) {
        let Some(pager) = self.pager() else { return };
        let faults = std::mem::take(&mut self.faults);
        if let Err(error) = pager.attach(faults) {
            tracing::error!(
                pod = self.machine.pod(),
                error = chain(&error),
                "missing pages are not asked for"
            );
        }
        for bits in PageBits::of(&pager.missing()) {
            self.runner.send(bits).await;
        }
        let pages = pager.left();
        self.runner.send(Wanted { pages }).await;
    }

    /// The guest is gone, or never was: nobody waits for pages.
    pub(super) fn end_pager(&self) {
        if let Some(pager) = self.pager() {
            pager.end();
        }
    }
}

/// The pager of this migration, made with the first pages that are missing.
fn begun(
    target: &OnceLock<Target>,
    ram: &VmRam,
    file: &std::path::Path,
    faults: Vec<Connection<Fault>>,
) -> Result<Arc<Pager>, String> {
    let target = target.get().ok_or("the guest's memory is gone")?;
    if let Some(pager) = target.pager.get() {
        return Ok(Arc::clone(pager));
    }
    let pager = Pager::begin(ram, file).map_err(|error| chain(&error))?;
    pager.attach(faults).map_err(|error| chain(&error))?;
    let pager = Arc::new(pager);
    // One step at a time marks pages.
    let _ = target.pager.set(Arc::clone(&pager));
    Ok(pager)
}
