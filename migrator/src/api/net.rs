//! `/v1/net`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use migrator_ebpf::{Direction, TraceEvent, Verdict, verdict_of};
use nix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::error::ApiError;
use super::net_types::{NetPeer, NodeNet, PodNet, TraceEnd, TraceFrame, TraceLine};
use super::types::ErrorCode;
use crate::daemon::node::Node;
use crate::network::{Port, Stage, Watch, dissect};

/// The longest that a trace may be asked for.
const LONGEST: Duration = Duration::from_secs(86_400);
/// How often a trace without frames says what it has missed.
const QUIET: Duration = Duration::from_millis(500);

fn peer(node: &Node, pod: &str) -> Option<NetPeer> {
    let under_way = node.migrations.list().into_iter().rev();
    let mut under_way = under_way.filter(|status| status.pod == pod && status.from == node.name());
    under_way
        .find(|status| status.report.is_none())
        .map(|status| NetPeer {
            node: status.to,
            migration: status.id,
            phase: status.phase,
        })
}

/// One of many: without what takes long to find out.
async fn pod_net(node: &Node, port: &Port) -> Result<PodNet, ApiError> {
    let port = port.facts().await.map_err(|error| {
        // It left between the look at the list and the look at the port.
        ApiError::caused(ErrorCode::NotFound, &error)
    })?;
    Ok(PodNet {
        node: node.name().to_owned(),
        peer: peer(node, &port.pod),
        port,
    })
}

fn find(node: &Node, name: &str) -> Result<Port, ApiError> {
    node.network.port(name).ok_or_else(|| {
        ApiError::not_found("pod", name)
            .hint("`migrator net show` lists those on this node's network")
    })
}

pub(super) async fn node(State(node): State<Arc<Node>>) -> Result<Json<NodeNet>, ApiError> {
    let facts = node.network.facts().await;
    let facts = facts.map_err(|error| ApiError::caused(ErrorCode::Internal, &error))?;
    let mut pods = Vec::new();
    for port in node.network.ports() {
        // One that leaves in this moment is not there.
        pods.extend(pod_net(&node, &port).await.ok());
    }
    Ok(Json(NodeNet {
        node: node.name().to_owned(),
        facts,
        pods,
    }))
}

pub(super) async fn pod(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
) -> Result<Json<PodNet>, ApiError> {
    let port = find(&node, &name)?;
    let mut net = pod_net(&node, &port).await?;
    net.port.conntrack = port.conntrack_facts().await;
    Ok(Json(net))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TraceQuery {
    count: Option<u64>,
    seconds: Option<u64>,
}

pub(super) async fn trace(
    State(node): State<Arc<Node>>,
    Path(name): Path<String>,
    Query(query): Query<TraceQuery>,
) -> Result<Response, ApiError> {
    let limit = query.seconds.map(Duration::from_secs);
    if limit.is_some_and(|limit| limit > LONGEST) {
        let text = format!("seconds must be at most {}", LONGEST.as_secs());
        return Err(ApiError::new(ErrorCode::Invalid, text));
    }
    let port = find(&node, &name)?;
    let failed = |error: std::io::Error| ApiError::caused(ErrorCode::Internal, &error);
    let tracer = Tracer {
        stages: port.stages(),
        watch: port.watch().map_err(failed)?,
        boot: boot_time().map_err(failed)?,
        until: limit.map(|limit| Instant::now() + limit),
        left: query.count,
        told: 0,
        waiting: VecDeque::from([TraceLine::Started {
            pod: name,
            node: node.name().to_owned(),
        }]),
        shutdown: node.shutdown.clone(),
        over: false,
    };
    // The port itself is not kept: the pod may leave.
    drop(port);
    let body = Body::from_stream(stream::unfold(tracer, |mut tracer| async {
        let line = tracer.next().await?;
        let bytes = serde_json::to_vec(&line).map(|mut bytes| {
            bytes.push(b'\n');
            Bytes::from(bytes)
        });
        Some((bytes, tracer))
    }));
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Unix time at zero of the programs' clock.
fn boot_time() -> std::io::Result<Duration> {
    let monotonic = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(now.unwrap_or_default().saturating_sub(monotonic))
}

struct Tracer {
    watch: Watch,
    stages: watch::Receiver<Stage>,
    boot: Duration,
    until: Option<Instant>,
    left: Option<u64>,
    told: u64,
    waiting: VecDeque<TraceLine>,
    shutdown: CancellationToken,
    over: bool,
}

impl Tracer {
    async fn next(&mut self) -> Option<TraceLine> {
        loop {
            if let Some(line) = self.waiting.pop_front() {
                return Some(line);
            }
            if self.over {
                return None;
            }
            if self.left == Some(0) {
                self.end(TraceEnd::Count);
                continue;
            }
            let until = self.until;
            let time_is_up = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let stages = &mut self.stages;
            let released = async {
                // What it stands at is borrowed, and is let go of here. An error: the thread of the port has ended.
                let _ = stages.wait_for(|stage| *stage == Stage::Released).await;
            };
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => self.end(TraceEnd::Shutdown),
                () = time_is_up => self.end(TraceEnd::Time),
                event = self.watch.next() => match event {
                    Some(event) => self.tell(&event),
                    None => self.end(TraceEnd::Shutdown),
                },
                () = released => self.end(TraceEnd::PodGone),
                () = tokio::time::sleep(QUIET) => self.tell_missed(),
            }
        }
    }

    fn tell(&mut self, event: &TraceEvent) {
        self.tell_missed();
        self.told += 1;
        self.left = self.left.map(|left| left.saturating_sub(1));
        let frame = traced(event, self.boot);
        self.waiting.push_back(TraceLine::Frame(Box::new(frame)));
    }

    fn tell_missed(&mut self) {
        let frames = self.watch.missed();
        if frames > 0 {
            self.waiting.push_back(TraceLine::Missed { frames });
        }
    }

    fn end(&mut self, reason: TraceEnd) {
        self.tell_missed();
        self.over = true;
        let frames = self.told;
        self.waiting.push_back(TraceLine::Ended { frames, reason });
    }
}

fn traced(event: &TraceEvent, boot: Duration) -> TraceFrame {
    let gate = event.gate();
    let at = boot + Duration::from_nanos(event.at_ns);
    let direction = event.direction();
    let verdict = event.counter().map(verdict_of);
    let tag = (event.vlan_protocol != 0).then_some(event.vlan_tci);
    TraceFrame {
        unix_us: at.as_micros() as u64,
        direction: match direction {
            Direction::In => "in".to_owned(),
            Direction::Out => "out".to_owned(),
        },
        counter: match event.counter() {
            Some(counter) => counter.name().to_owned(),
            None => format!("counter {}", event.counter),
        },
        verdict: match verdict {
            Some(Verdict::Pass(_)) => "pass".to_owned(),
            Some(Verdict::Park(_)) => "park".to_owned(),
            Some(Verdict::Show(_)) => "show".to_owned(),
            Some(Verdict::Tunnel(_)) => "tunnel".to_owned(),
            Some(Verdict::Out(_)) => "out".to_owned(),
            Some(Verdict::Drop(_)) => "drop".to_owned(),
            None => "unknown".to_owned(),
        },
        mode: gate.mode.name().to_owned(),
        epoch: gate.epoch,
        bucket: match direction {
            Direction::In => Some(event.bucket),
            Direction::Out => None,
        },
        length: event.length,
        head: dissect(event.head(), tag),
    }
}
