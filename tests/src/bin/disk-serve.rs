//! Serves a file as a disk, as the service does: `disk-serve FILE SOCKET`, until its standard input ends. For `cargo xtask bench image`.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use migrator::block::Disk;
use migrator::block::nbd::Server;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [file, socket] = words.as_slice() else {
        bail!("usage: disk-serve FILE SOCKET");
    };
    let disk = Arc::new(Disk::open(Path::new(file))?);
    let _server = Server::start(disk, Path::new(socket))?;
    println!("serving");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
