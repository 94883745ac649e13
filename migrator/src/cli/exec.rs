//! `migrator exec POD -- COMMAND`.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use bytes::Bytes;
use clap::Args;
use futures::SinkExt;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::codec::Framed;

use super::failure::{Exit, Failure};
use super::tty::{self, RawMode};
use super::{Context, Output, output};
use crate::api::error::{ApiError, chain};
use crate::api::frames::{ExecCodec, ExecFrame};
use crate::api::types::{ErrorInfo, ExecEvent, ExecRequest, TtySize};
use crate::pods::logs::LogStream;

#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// The pod
    pod: String,
    /// The container; the pod's first if absent
    #[arg(short, long)]
    container: Option<String>,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Send standard input to the command
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// The command and its arguments, behind `--`
    #[arg(last = true, required = true)]
    pub(super) command: Vec<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

impl ExecArgs {
    pub(super) async fn run(self, context: &Context) -> Result<ExitCode, Failure> {
        // Whatever is our own fault must not look like the command's exit code.
        self.follow(context)
            .await
            .map_err(|failure| failure.with_exit(Exit::Exec))
    }

    async fn follow(self, context: &Context) -> Result<ExitCode, Failure> {
        let terminal = self.tty && std::io::stdin().is_terminal();
        if self.tty && self.interactive && !terminal {
            return Err(Failure::new(Exit::Exec, "standard input is not a terminal")
                .hint("leave out -t, or leave out -i"));
        }
        let size = self.tty.then(|| {
            tty::size(std::io::stdout().as_fd()).unwrap_or(TtySize { rows: 24, cols: 80 })
        });
        let request = ExecRequest {
            container: self.container,
            argv: self.command,
            env: self.env,
            tty: size,
            stdin: self.interactive,
        };
        let stream = context.client.exec(&self.pod, &request).await?;
        let raw = (terminal && self.interactive)
            .then(RawMode::enter)
            .transpose()
            .map_err(|error| {
                Failure::new(Exit::Exec, format!("cannot set up the terminal: {error}"))
            })?;
        let mut session = Session {
            stream,
            output: context.output,
            winch: handler(SignalKind::window_change())?,
            term: handler(SignalKind::terminate())?,
            hangup: handler(SignalKind::hangup())?,
        };
        let result = session.run(self.interactive, self.tty).await;
        drop(raw);
        result
    }
}

fn handler(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind)
        .map_err(|error| Failure::new(Exit::Exec, format!("cannot handle signals: {error}")))
}

struct Session {
    stream: Framed<TokioIo<Upgraded>, ExecCodec>,
    output: Output,
    winch: Signal,
    term: Signal,
    hangup: Signal,
}

impl Session {
    async fn run(&mut self, interactive: bool, tty: bool) -> Result<ExitCode, Failure> {
        use futures::StreamExt;
        let mut stdin = interactive.then(read_stdin);
        loop {
            tokio::select! {
                frame = self.stream.next() => match frame {
                    Some(Ok(frame)) => if let Some(code) = self.frame(frame).await? {
                        return Ok(code);
                    },
                    Some(Err(error)) => return Err(Failure::new(Exit::Exec, chain(&error))),
                    None => return Err(Failure::new(Exit::Exec, "the service closed the stream")
                        .hint("the pod may have moved or stopped: see `migrator ps`")),
                },
                data = next(&mut stdin), if stdin.is_some() => match data {
                    Some(data) => self.send(ExecFrame::Stdin(data)).await?,
                    None => {
                        stdin = None;
                        self.send(ExecFrame::StdinEnd).await?;
                    }
                },
                _ = self.winch.recv(), if tty => {
                    if let Some(size) = tty::size(std::io::stdout().as_fd()) {
                        self.send(ExecFrame::Resize(size)).await?;
                    }
                }
                _ = self.term.recv() => {
                    self.send(ExecFrame::Signal(libc::SIGTERM.unsigned_abs())).await?;
                }
                _ = self.hangup.recv() => {
                    return Err(Failure::new(Exit::Exec, "the terminal went away"));
                }
            }
        }
    }

    async fn send(&mut self, frame: ExecFrame) -> Result<(), Failure> {
        self.stream
            .send(frame)
            .await
            .map_err(|error| Failure::new(Exit::Exec, chain(&error)))
    }

    /// Deals with a frame from the service; an exit code ends the session.
    async fn frame(&mut self, frame: ExecFrame) -> Result<Option<ExitCode>, Failure> {
        let event = match frame {
            ExecFrame::Stdout(data) => {
                self.print(LogStream::Stdout, &data).await?;
                return Ok(None);
            }
            ExecFrame::Stderr(data) => {
                self.print(LogStream::Stderr, &data).await?;
                return Ok(None);
            }
            ExecFrame::Exited(code) => ExecEvent::Exited { code },
            ExecFrame::Failed(json) => {
                let error: ErrorInfo = serde_json::from_slice(&json)
                    .map_err(|error| Failure::new(Exit::Exec, error.to_string()))?;
                return Err(ApiError(error).into());
            }
            ExecFrame::Stdin(_)
            | ExecFrame::StdinEnd
            | ExecFrame::Resize(_)
            | ExecFrame::Signal(_) => {
                return Err(Failure::new(
                    Exit::Exec,
                    "the service sent a frame that only a client sends",
                ));
            }
        };
        if self.output == Output::Json {
            output::json(&event)?;
        }
        Ok(match event {
            // A process's exit code has 8 bits (wait(2)).
            ExecEvent::Exited { code } => Some(ExitCode::from(code.to_le_bytes()[0])),
            ExecEvent::Output { .. } | ExecEvent::Failed { .. } => None,
        })
    }

    async fn print(&mut self, stream: LogStream, data: &Bytes) -> Result<(), Failure> {
        if self.output == Output::Json {
            output::json(&ExecEvent::Output {
                stream,
                text: String::from_utf8_lossy(data).into_owned(),
            })?;
            return Ok(());
        }
        // Whoever reads us may be slow, and input goes on meanwhile.
        let data = data.clone();
        let write = move || match stream {
            LogStream::Stdout => write_all(std::io::stdout().lock(), &data),
            LogStream::Stderr => write_all(std::io::stderr().lock(), &data),
        };
        tokio::task::spawn_blocking(write)
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))?;
        Ok(())
    }
}

fn write_all(mut out: impl Write, data: &[u8]) -> std::io::Result<()> {
    out.write_all(data)?;
    out.flush()
}

/// Reads standard input on a thread of its own, which may be left behind in its read at the end.
fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        // An unreadable stdin is an ended one.
        while let Ok(read) = std::io::stdin().read(&mut buffer) {
            let data = buffer.get(..read).unwrap_or_default();
            if data.is_empty() || sender.blocking_send(Bytes::copy_from_slice(data)).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn next(stdin: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    stdin.as_mut()?.recv().await
}
