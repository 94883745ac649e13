//! Templates: booted, idle guests of a shape, kept as their memory and device state, from which pods of that shape start.
//!
//! ```text
//!   STATE_DIR/templates/KEY/template.json   what it is, and the digests of the others
//!                           memory          guest RAM, a sparse file; what is zero is a hole
//!                           state           the device state, as a migration has it
//!   build    boot without a pod ──▶ settle ──▶ stop ──▶ save ──▶ rename      (build.rs)
//!   use      copy the memory, load the state ──▶ run ──▶ new identity         (pods/warm.rs)
//! ```
//!
//! They are an optimisation: a template that is not there, damaged, or does not start makes the pod boot from its kernel. What is
//! damaged or does not start is removed. `KEY` names everything that the saved state depends on, see [`key`].
//!
//! Guest RAM is shared between QEMU and the service, which a private mapping of the template's file cannot be: so it is
//! copied, not mapped. That takes less time than QEMU's own start, and goes on beside it.

mod build;
mod error;
mod key;
mod later;
mod memory;
mod store;

pub use build::build;
pub use error::TemplateError;
pub use key::{Key, MAC, shape};
pub use later::make_later;
pub(crate) use store::Opened;
pub use store::{Template, TemplateFile, Templates};
