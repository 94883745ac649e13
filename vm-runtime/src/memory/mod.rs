//! Guest memory, seen from outside the VMM.
//!
//! Guest RAM is one memfd that the service makes and QEMU maps shared. The service reads and
//! writes it with `pread` and `pwrite`, or copies words out of a mapping ([`MemoryView`]): no Rust
//! reference ever points into memory that a guest can change. Which pages the guest wrote is asked of the kernel
//! ([`DirtyTracker`]); pages that it does not have yet are put in place before it can look at them ([`MissingPages`]).

mod dirty;
mod file;
mod lz4;
mod maps;
mod missing;
mod page;
mod pagemap;
mod reader;
#[cfg(test)]
mod testing;
mod uffd;
mod view;

pub use dirty::{DirtyError, DirtyTracker};
pub use file::GuestMemory;
pub use lz4::{lz4_pack, lz4_room, lz4_unpack};
pub use maps::{Mapping, find_mappings};
pub use missing::{MissingError, MissingPages};
pub use page::{is_zero, page_hash};
pub use reader::PageReader;
pub use uffd::{UFFD_FEATURES, handshake};
pub use view::MemoryView;
