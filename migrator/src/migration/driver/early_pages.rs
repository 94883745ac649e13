//! Pages for guests that lack some when the service starts.
//!
//! A VMM may itself wait for a page, and then answers nobody: its monitor can be spoken to only once pages come again. So this comes
//! before such a pod is found again: a pager, and just enough of a machine to have the source send. When the pod is there, the real
//! machine takes the pager over; the source loses this link, and dials that one.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::sync::CancellationToken;
use vm_runtime::vm::VmRecord;

use super::arrive::Relinked;
use super::destination_pages::{SUFFIX, missing_file, spool};
use super::link::LinkEvent;
use crate::api::error::chain;
use crate::daemon::node::Node;
use crate::memory::postcopy::Pager;
use crate::memory::receive::{self, Target};
use crate::migration::journal::{DestinationRecord, Recovery};
use crate::wire::conn::Connection;
use crate::wire::id::MigrationId;
use crate::wire::message::{Control, PageBits, QueryReply, Verdict, Wanted};

/// Begins to page for every guest of this node that lacks pages. Files of guests that do not are removed.
pub(super) async fn page_early(node: &Arc<Node>, journal: &Recovery) {
    let granted = |record: &&DestinationRecord| record.verdict() == Some(Verdict::Running);
    let records: Vec<_> = journal
        .destinations
        .iter()
        .map(|(record, _)| record)
        .filter(granted)
        .collect();
    remove_others(node, &records);
    for record in records {
        let file = missing_file(node, record.migration);
        if !file.exists() {
            continue;
        }
        match pager(&node.pods_dir().join(&record.pod), &file) {
            Ok(Some(target)) => {
                let target = Arc::new(OnceLock::from(target));
                let (asked, end) = node.arrivals.page(record.migration, &record.pod, &target);
                tracing::info!(
                    pod = record.pod,
                    from = record.from,
                    "its guest lacks pages, which are asked for again"
                );
                node.tasks
                    .spawn(serve(end, record.migration, target, asked));
            }
            Ok(None) => {}
            Err(reason) => tracing::error!(
                pod = record.pod,
                reason,
                "its guest lacks pages that cannot be asked for"
            ),
        }
    }
}

fn pager(dir: &Path, file: &Path) -> Result<Option<Target>, String> {
    let Ok(record) = VmRecord::load(dir) else {
        // Without a VM nobody waits.
        let _ = std::fs::remove_file(file);
        return Ok(None);
    };
    let ram = record.ram().map_err(|error| chain(&error))?;
    let pager = Pager::resume(&ram, file).map_err(|error| chain(&error))?;
    Ok(pager.map(|pager| Target::paged(ram.memory(), Arc::new(pager))))
}

/// What a migration left that never came to its grant.
fn remove_others(node: &Node, records: &[&DestinationRecord]) {
    let wanted: Vec<_> = records
        .iter()
        .map(|r| missing_file(node, r.migration))
        .collect();
    for entry in std::fs::read_dir(spool(node))
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = entry.path();
        if path.to_string_lossy().ends_with(SUFFIX)
            && !wanted.contains(&path)
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove it");
        }
    }
}

/// Has the source send, until the pod is found.
async fn serve(
    end: CancellationToken,
    migration: MigrationId,
    target: Arc<OnceLock<Target>>,
    mut asked: UnboundedReceiver<Relinked>,
) {
    let mut link: Option<Relinked> = None;
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            Some(mut new) = asked.recv() => {
                answer(migration, &target, &mut new).await;
                link = Some(new);
            }
            Some(event) = events(&mut link) => if let LinkEvent::Lost(reason) = event {
                tracing::info!(%migration, reason, "the source's link is lost");
                link = None;
            },
        }
    }
}

async fn events(link: &mut Option<Relinked>) -> Option<LinkEvent> {
    match link {
        Some(link) => link.events.recv().await,
        None => std::future::pending().await,
    }
}

async fn answer(migration: MigrationId, target: &Arc<OnceLock<Target>>, asked: &mut Relinked) {
    let Some(pager) = target.get().and_then(|target| target.pager.get()) else {
        return;
    };
    // Pages alone come: who reports and who ends is of no interest here.
    let (arrivals, mut arrived) = tokio::sync::mpsc::channel(1);
    let data = std::mem::take(&mut asked.data);
    let readers = data.into_iter().map(Connection::into_reader);
    receive::start(readers.collect(), target, &arrivals);
    tokio::spawn(async move { while arrived.recv().await.is_some() {} });
    if let Err(error) = pager.attach(std::mem::take(&mut asked.faults)) {
        tracing::error!(error = chain(&error), "missing pages are not asked for");
    }
    let verdict = Verdict::Running;
    let reply = QueryReply {
        migration,
        verdict,
        wants_pages: true,
    };
    let mut messages: Vec<Control> = vec![reply.into()];
    messages.extend(
        PageBits::of(&pager.missing())
            .into_iter()
            .map(Control::from),
    );
    messages.push(
        Wanted {
            pages: pager.left(),
        }
        .into(),
    );
    for message in messages {
        if asked.link.control.send(message).await.is_err() {
            // Its reader tells why.
            return;
        }
    }
}
