//! The API: HTTP/1.1 and JSON over the service's Unix socket. `docs/api.md` lists the routes.

pub mod client;
pub mod error;
pub mod frames;
pub mod image_types;
pub mod net_types;
pub mod server;
pub mod types;
pub mod upgrade;

mod container_types;
mod exec;
mod images;
mod logs;
mod migrations;
mod net;
mod pods;
mod registry;
mod registry_errors;
mod volumes;
