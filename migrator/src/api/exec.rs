//! `POST /v1/pods/NAME/exec`: upgraded to the framed stream, or answered line by line.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt, stream};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio_util::codec::Framed;
use tokio_util::sync::CancellationToken;
use vm_runtime::agent_client::{AgentError, Exec, ExecControl, ExecInput, ExecSpec, Stream};

use super::error::ApiError;
use super::frames::{ExecCodec, ExecFrame, MAX_PAYLOAD, PROTOCOL};
use super::types::{ErrorCode, ExecEvent, ExecRequest, TtySize};
use crate::daemon::node::Node;
use crate::pods::log_stream;

pub(super) async fn exec(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let upgrade = wants_upgrade(request.headers())
        .then(|| request.extensions_mut().remove::<OnUpgrade>())
        .flatten();
    let Json(exec) = Json::<ExecRequest>::from_request(request, &())
        .await
        .map_err(|e| ApiError::new(ErrorCode::Invalid, e.body_text()))?;
    if exec.argv.first().is_none_or(String::is_empty) {
        return Err(ApiError::new(
            ErrorCode::Invalid,
            "argv must name a program",
        ));
    }
    let pod = node.pods.get(&name)?;
    let (agent, container) = pod.agent_for(exec.container.as_deref()).await?;
    let running = agent
        .exec(ExecSpec {
            container,
            argv: exec.argv,
            env: exec.env,
            tty: exec.tty.map(|TtySize { rows, cols }| (rows, cols)),
            stdin: exec.stdin && upgrade.is_some(),
        })
        .await
        .map_err(failure)?;
    match upgrade {
        Some(upgrade) => {
            let shutdown = node.shutdown.clone();
            node.tasks.spawn(async move {
                match upgrade.await {
                    Ok(stream) => serve(stream, running, shutdown).await,
                    Err(error) => tracing::warn!(%error, "an exec stream was not upgraded"),
                }
            });
            Ok((
                StatusCode::SWITCHING_PROTOCOLS,
                [(CONNECTION, "upgrade"), (UPGRADE, PROTOCOL)],
            )
                .into_response())
        }
        None => Ok(lines(running)),
    }
}

fn wants_upgrade(headers: &HeaderMap) -> bool {
    headers
        .get(UPGRADE)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(PROTOCOL.as_bytes()))
}

fn failure(error: AgentError) -> ApiError {
    let code = match &error {
        AgentError::Refused(_) | AgentError::TooLong(_) => ErrorCode::Invalid,
        AgentError::NoAnswer(_) => ErrorCode::Timeout,
        AgentError::Detached => ErrorCode::Busy,
        AgentError::Gone | AgentError::Confused => ErrorCode::Internal,
    };
    ApiError::caused(code, &error)
}

/// The stream ended and no exit code came.
fn cut_off() -> ApiError {
    ApiError::new(
        ErrorCode::Internal,
        "the connection to the guest ended before the command did",
    )
    .hint("the pod may have moved or stopped: see `migrator ps`")
}

/// Output without an upgrade: one JSON object a line. Standard input is empty.
fn lines(running: Exec) -> Response {
    let (_, output, _, exit) = running.split();
    let body = stream::unfold(Some((output, exit)), |state| async {
        let (mut output, exit) = state?;
        let (event, next) = match output.next().await {
            Some((stream, data)) => {
                let text = String::from_utf8_lossy(&data).into_owned();
                let stream = log_stream(stream);
                (ExecEvent::Output { stream, text }, Some((output, exit)))
            }
            None => match exit.await {
                Ok(code) => (ExecEvent::Exited { code }, None),
                Err(_) => (ExecEvent::Failed { error: cut_off().0 }, None),
            },
        };
        let line = serde_json::to_vec(&event).map(|mut line| {
            line.push(b'\n');
            Bytes::from(line)
        });
        Some((line, next))
    });
    (
        [(CONTENT_TYPE, "application/x-ndjson")],
        Body::from_stream(body),
    )
        .into_response()
}

type Out = SplitSink<Framed<TokioIo<Upgraded>, ExecCodec>, ExecFrame>;

/// Carries frames both ways until the command has ended or the client is gone.
async fn serve(stream: Upgraded, running: Exec, shutdown: CancellationToken) {
    let (mut out, mut frames) = Framed::new(TokioIo::new(stream), ExecCodec).split();
    let (input, mut output, control, exit) = running.split();
    // Input waits for the command to take it, so that it must not hold up the output.
    let hangup = control.clone();
    let feeding = tokio::spawn(async move {
        let mut input = input;
        while let Some(Ok(frame)) = frames.next().await {
            if feed(frame, &mut input, &control).await.is_err() {
                return;
            }
        }
        // The client is gone: what it started has nobody to talk to any more.
        let _ = hangup.signal(libc::SIGHUP);
    });
    let carried = async {
        while let Some((stream, data)) = output.next().await {
            send(&mut out, stream, data).await?;
        }
        let last = match exit.await {
            Ok(code) => ExecFrame::Exited(code),
            Err(_) => failed(&cut_off()),
        };
        out.send(last).await
    };
    let result = tokio::select! {
        result = carried => result,
        () = shutdown.cancelled() => Ok(()),
    };
    if let Err(error) = result {
        tracing::debug!(%error, "an exec's client went away");
    }
    feeding.abort();
    let _ = out.close().await;
}

async fn send(
    out: &mut Out,
    stream: Stream,
    data: Vec<u8>,
) -> Result<(), super::frames::FrameError> {
    let mut data = Bytes::from(data);
    while !data.is_empty() {
        let piece = data.split_to(data.len().min(MAX_PAYLOAD));
        out.send(match stream {
            Stream::Stdout => ExecFrame::Stdout(piece),
            Stream::Stderr => ExecFrame::Stderr(piece),
        })
        .await?;
    }
    Ok(())
}

fn failed(error: &ApiError) -> ExecFrame {
    // Strings have no way to fail.
    ExecFrame::Failed(serde_json::to_vec(&error.0).unwrap_or_default().into())
}

/// Hands one frame of the client to the command.
async fn feed(
    frame: ExecFrame,
    input: &mut Option<ExecInput>,
    control: &ExecControl,
) -> Result<(), AgentError> {
    match frame {
        ExecFrame::Stdin(data) => match input {
            Some(input) => input.write(&data).await,
            None => Ok(()),
        },
        ExecFrame::StdinEnd => input.take().map_or(Ok(()), ExecInput::close),
        ExecFrame::Resize(TtySize { rows, cols }) => control.resize(rows, cols),
        ExecFrame::Signal(number) => match i32::try_from(number) {
            Ok(number) => control.signal(number),
            Err(_) => Ok(()),
        },
        // A client has no business to send these.
        ExecFrame::Stdout(_)
        | ExecFrame::Stderr(_)
        | ExecFrame::Exited(_)
        | ExecFrame::Failed(_) => Ok(()),
    }
}
