//! `/v1/pulls` and `/v1/pushes`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_util::sync::DropGuard;

use super::error::ApiError;
use super::image_types::{PullRequest, PushRequest, PushedChunks, TransferEvent};
use super::images::{absolute, in_use, summary};
use super::registry_errors::{of_pull, of_push};
use super::types::ErrorCode;
use crate::daemon::node::Node;
use crate::image::Platform;
use crate::registry::{Meter, Progress, PullOptions, PushOptions, Reference};

/// Between two lines of progress.
const TICK: Duration = Duration::from_millis(100);

pub(super) async fn pull(
    State(node): State<Arc<Node>>,
    Json(request): Json<PullRequest>,
) -> Result<Response, ApiError> {
    let reference = parse::<Reference>(&request.reference)?;
    let platform = match &request.platform {
        Some(text) => parse::<Platform>(text)?,
        None => Platform::default(),
    };
    if let Some(path) = &request.auth_file {
        absolute(path)?;
    }
    let options = PullOptions {
        name: request.name,
        auth_file: request.auth_file,
        plain_http: request.plain_http,
        platform,
        keep_layers: request.keep_layers,
        lazy: request.lazy.unwrap_or(node.config.registries.lazy),
        lease: Duration::from_secs(request.lease_s),
    };
    let ended = node.shutdown.child_token();
    let gone = ended.clone().drop_guard();
    let (meter, progress) = Meter::new();
    let own = Arc::clone(&node);
    let task = node.tasks.spawn(async move {
        let pulled = own.registries.pull(&reference, &options, &meter, &ended);
        match pulled.await {
            Ok(pulled) => {
                if pulled.lazy {
                    own.supply.fill(&Arc::new(pulled.record.clone()));
                }
                TransferEvent::Pulled {
                    image: summary(&own, pulled.record, &in_use(&own)),
                    transferred_bytes: pulled.transferred_bytes,
                }
            }
            Err(error) => TransferEvent::Failed {
                error: of_pull(&error).0,
            },
        }
    });
    Ok(Course::new(task, progress, gone).into_response())
}

pub(super) async fn push(
    State(node): State<Arc<Node>>,
    Json(request): Json<PushRequest>,
) -> Result<Response, ApiError> {
    let target = parse::<Reference>(&request.to)?;
    if let Some(path) = &request.auth_file {
        absolute(path)?;
    }
    let options = PushOptions {
        auth_file: request.auth_file,
        plain_http: request.plain_http,
        chunks: request.chunks,
    };
    let ended = node.shutdown.child_token();
    let gone = ended.clone().drop_guard();
    let (meter, progress) = Meter::new();
    let own = Arc::clone(&node);
    let task = node.tasks.spawn(async move {
        let registries = &own.registries;
        let pushed = registries.push(&request.image, &target, &options, &meter, &ended);
        match pushed.await {
            Ok(pushed) => TransferEvent::Pushed {
                to: target.to_string(),
                digest: pushed.digest.to_string(),
                transferred_bytes: pushed.transferred_bytes,
                chunks: pushed.chunks.map(|chunks| PushedChunks {
                    digest: chunks.artifact.to_string(),
                    packed_bytes: chunks.packed_bytes,
                    plain_bytes: chunks.plain_bytes,
                }),
            },
            Err(error) => TransferEvent::Failed {
                error: of_push(&error).0,
            },
        }
    });
    Ok(Course::new(task, progress, gone).into_response())
}

fn parse<T: std::str::FromStr<Err: std::error::Error + 'static>>(
    text: &str,
) -> Result<T, ApiError> {
    text.parse()
        .map_err(|error: T::Err| ApiError::caused(ErrorCode::Invalid, &error))
}

/// A transfer under way, told line by line. Dropped, as it is when the client goes away, it ends the transfer.
struct Course {
    task: JoinHandle<TransferEvent>,
    progress: watch::Receiver<Progress>,
    tick: Interval,
    over: bool,
    _gone: DropGuard,
}

impl Course {
    fn new(
        task: JoinHandle<TransferEvent>,
        mut progress: watch::Receiver<Progress>,
        gone: DropGuard,
    ) -> Self {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        progress.mark_changed();
        Self {
            task,
            progress,
            tick,
            over: false,
            _gone: gone,
        }
    }

    async fn next(&mut self) -> Option<TransferEvent> {
        if self.over {
            return None;
        }
        let changed = async {
            self.tick.tick().await;
            // Its end is the task's.
            if self.progress.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            result = &mut self.task => {
                self.over = true;
                Some(result.unwrap_or_else(|error| TransferEvent::Failed {
                    error: ApiError::caused(ErrorCode::Internal, &error).0,
                }))
            }
            () = changed => {
                let progress = self.progress.borrow_and_update().clone();
                Some(TransferEvent::Progress(progress))
            }
        }
    }
}

impl IntoResponse for Course {
    fn into_response(self) -> Response {
        let lines = stream::unfold(self, |mut course| async {
            let event = course.next().await?;
            let line = serde_json::to_vec(&event).map(|mut line| {
                line.push(b'\n');
                Bytes::from(line)
            });
            Some((line, course))
        });
        let body = Body::from_stream(lines);
        ([(CONTENT_TYPE, "application/x-ndjson")], body).into_response()
    }
}
