//! A TCP connection to the guest, and a command in it: what has to live on while something is done to the pod.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use migrator_tests::lab::{POD, SOON, TestLab};
use xtask::lab::Node;
use xtask::netns;
use xtask::process::poll_until;

/// Where the guest's TCP echo listens.
const TCP_ECHO: &str = "10.77.0.10:9000";
/// How a command's client ends whose pod has moved: the command goes on without it (docs/cli.md).
const LEFT_BEHIND: i32 = 125;
/// Longest silence of a socket on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to an echo in the guest, which a command there serves.
pub struct Connection {
    stream: BufReader<TcpStream>,
    command: Child,
    lines: u32,
}

impl Connection {
    pub fn open(test: &TestLab) -> Result<Self> {
        Self::open_by(test, TCP_ECHO)
    }

    /// By an address that some node translates into that of the guest.
    pub fn open_by(test: &TestLab, address: &str) -> Result<Self> {
        let port = TCP_ECHO.rsplit_once(':').context("no port")?.1;
        let serve = format!("exec nc -l -p {port} -e /bin/cat");
        let command = test
            .lab()
            .on(Node::A)
            .args(["exec", POD, "--", "/bin/sh", "-c", &serve])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let address: SocketAddr = address.parse()?;
        let mut connected = None;
        poll_until(SOON, || {
            let connect = || Ok(TcpStream::connect_timeout(&address, PATIENCE)?);
            connected = netns::within(&test.lab().client(), connect).ok();
            connected.is_some()
        });
        let stream = connected.context("the guest's TCP echo does not accept")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut connection = Self {
            stream: BufReader::new(stream),
            command,
            lines: 0,
        };
        connection.lives_on()?;
        Ok(connection)
    }

    /// A line goes there and back, behind those before it; and the client of the command still waits for its end, or was told that its pod has
    /// moved.
    pub fn lives_on(&mut self) -> Result<()> {
        self.lines += 1;
        // Long enough for segments that only the receiver's end cuts, in both directions.
        let line = format!("line {} {}\n", self.lines, "x".repeat(60_000));
        self.stream.get_mut().write_all(line.as_bytes())?;
        let mut echo = String::new();
        self.stream.read_line(&mut echo)?;
        let (head, length) = (echo.get(..20), echo.len());
        ensure!(
            echo == line,
            "line {} comes back as {head:?}, {length} bytes",
            self.lines
        );
        let ended = self.command.try_wait()?;
        let waits = ended.is_none_or(|status| status.code() == Some(LEFT_BEHIND));
        ensure!(waits, "the command has ended: {ended:?}");
        Ok(())
    }

    /// Ends the connection. The command's client does not see it: it was told that the pod has moved.
    pub fn abandon(mut self) -> Result<()> {
        self.command.kill()?;
        self.command.wait()?;
        Ok(())
    }

    /// Ends the connection; the command ends by that, and its client sees it.
    pub fn close(self) -> Result<()> {
        let Self {
            stream,
            mut command,
            ..
        } = self;
        drop(stream);
        let mut status = None;
        poll_until(SOON, || {
            status = command.try_wait().ok().flatten();
            status.is_some()
        });
        ensure!(
            status.is_some_and(|status| status.success()),
            "the command ends with {status:?}"
        );
        Ok(())
    }
}
