//! The pod of the servers: where it is, and how to reach it.

use std::cell::Cell;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Node};
use crate::process::poll_until;
use crate::{cmd, netns};

/// The pod.
pub(super) const POD: &str = "apps";
/// Its address.
pub(super) const ADDRESS: &str = "10.77.0.30";

/// Far more than a switchover, far less than TCP's patience.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// A guest boots in 5 s under emulation, and PostgreSQL makes its first tables in some 20 more.
const COMES_UP_WITHIN: Duration = Duration::from_secs(240);

/// What a command in the pod may take.
const COMMAND_WITHIN: Duration = Duration::from_secs(180);

/// A pod in the lab.
pub(super) struct Place<'a> {
    /// The lab.
    pub(super) lab: &'a Lab,
    /// The client's namespace.
    pub(super) namespace: &'a str,
    /// The pod's address.
    pub(super) address: &'a str,
    /// Where it is.
    pub(super) at: Cell<Node>,
}

impl Place<'_> {
    /// Runs a command in a container; what it prints.
    ///
    /// # Errors
    /// It fails.
    pub(super) fn exec(&self, container: &str, words: &[&str]) -> Result<String> {
        let mut command = self.lab.on(self.at.get());
        command
            .args(["exec", POD, "-c", container, "--"])
            .args(words);
        let said = cmd::bounded(&mut command, COMMAND_WITHIN)?;
        ensure!(
            said.code == Some(0),
            "`{}` in {container} ends with {:?}: {}{}",
            words.join(" "),
            said.code,
            said.out,
            said.err
        );
        Ok(said.out)
    }

    /// What a container has printed.
    ///
    /// # Errors
    /// The node does not tell.
    pub(super) fn logs(&self, container: &str) -> Result<String> {
        let mut command = self.lab.on(self.at.get());
        cmd::output(command.args(["logs", POD, container]))
    }

    /// A connection from the client's namespace.
    ///
    /// # Errors
    /// Nobody takes it.
    pub(super) fn connect(&self, port: u16) -> Result<TcpStream> {
        connect(self.namespace, self.address.parse()?, port)
    }

    /// Waits until a server that is starting takes connections.
    ///
    /// # Errors
    /// It does not come to that.
    pub(super) fn comes_up(&self, container: &str, port: u16) -> Result<Duration> {
        let began = Instant::now();
        let up = poll_until(COMES_UP_WITHIN, || self.connect(port).is_ok());
        ensure!(
            up,
            "{container} takes no connections at port {port}; it says: {}",
            self.logs(container).unwrap_or_default()
        );
        Ok(began.elapsed())
    }
}

/// A connection from a namespace.
///
/// # Errors
/// Nobody takes it.
pub(super) fn connect(namespace: &str, address: IpAddr, port: u16) -> Result<TcpStream> {
    let server = SocketAddr::new(address, port);
    let stream = netns::within(namespace, || {
        TcpStream::connect_timeout(&server, ANSWERS_WITHIN)
            .with_context(|| format!("cannot connect to {server}"))
    })?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    stream.set_write_timeout(Some(ANSWERS_WITHIN))?;
    Ok(stream)
}
