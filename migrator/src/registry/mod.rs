//! Images from registries, and back: the client side of the OCI distribution specification.
//!
//! ```text
//!  reference ──endpoint──▶ mirrors, registry
//!      │                        │ session: credentials, tokens
//!      ▼                        ▼
//!   pull: manifest ─▶ index? ─▶ manifest ─▶ blobs (several at a time, resumed) ─▶ image::content
//!                                                                                     │ as a layout
//!   push: image::content ─▶ blobs ─▶ manifest                          the import of `image` ◀┘
//! ```
//!
//! A registry is hostile until its bytes are verified: answers are read up to a limit, sizes are known before anything
//! is fetched, a blob counts when its digest is right, and the layers then go through the same import as those of a
//! file.
//!
//! Built on `reqwest` (HTTP, proxies), `http-auth` (challenges) and rustls. `oci-client` was tried first, and does not fit here: it reads manifests,
//! tokens and errors into memory whatever their length, panics on a token that no header can carry, does not show
//! `Retry-After`, and knows no identity tokens.
//!
//! What is absent: anything about how an image becomes a device.

pub mod credentials;
pub mod progress;
pub mod reference;

pub mod chunks;

mod challenge;
mod endpoint;
mod failure;
mod fetch;
mod http;
mod lazy;
mod pull;
mod push;
mod retry;
mod session;
mod setup;
mod source;
mod upload;

pub use credentials::BadCredentials;
pub use failure::RequestError;
pub use fetch::FetchError;
pub use http::ClientSetupError;
pub use progress::{Meter, Phase, Progress};
pub use pull::{PullError, PullOptions, Pulled, Registries};
pub use push::{PushError, PushOptions, Pushed};
pub use reference::{BadReference, Reference};
pub use setup::SetupError;
pub use source::RegistrySource;
