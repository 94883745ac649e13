//! The API: HTTP/1.1 and JSON over the service's Unix socket. `docs/api.md` lists the routes.

pub mod client;
pub mod error;
pub mod frames;
pub mod image_types;
pub mod net_types;
pub mod server;
pub mod template_types;
pub mod types;
pub mod upgrade;
mod verify;

mod container_types;
mod exec;
pub(crate) mod images;
mod logs;
mod migrations;
mod net;
mod pods;
mod registry;
pub(crate) mod registry_errors;
mod templates;
mod volumes;
