//! Post-copy: the guest runs at the destination, and what it lacks comes from the stopped source.
//!
//! ```text
//! destination                                     source
//!   vCPU touches a page ─▶ fault thread ── Request ─▶ server thread ─▶ copies the page out of the stopped guest
//!   vCPU goes on ◀─ placed ◀─ reply thread ◀─ Pages ──┘     (fault connections, plain threads)
//!   placed ◀────────────────────── Pages, Zeros ──── data connections, in the order of the push queue
//! ```
//!
//! Why a page cannot be overwritten by an older one: the source's guest stands still, so a page has one content for the
//! rest of the migration, and the kernel puts it in place only where there is none (`UFFDIO_COPY` says `EEXIST` otherwise).
//! Why none is lost: the missing pages are a set that only a placed page leaves ([`missing`]); it outlives the service in a
//! file, and after a lost link the destination says what is left of it.
//!
//! Where threads meet ([`bits`], [`waits`]), every order of their steps is tried by a test.
//!
//! What is absent: the decision to go this way (`migration::source`), and who runs the guest.

mod bits;
mod histogram;
mod link;
mod missing;
#[cfg(test)]
mod model;
mod pager;
mod push;
mod serve;
mod waits;

/// What `model.rs` replaces.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU64, Ordering};
    pub(super) use std::sync::{Mutex, MutexGuard, PoisonError};
}

pub use histogram::quantile;
pub use missing::{MissingSet, SetError};
pub use pager::{Pager, PagerError};
pub use push::PushQueue;
pub use serve::PageServer;
