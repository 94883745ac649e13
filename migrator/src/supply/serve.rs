//! Chunks for another node.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::api::error::chain;
use crate::image::{Chunks, Digest};
use crate::wire::bulk::Data;
use crate::wire::control;
use crate::wire::message::Control;
use crate::wire::session::Session;

/// Chunks that are read ahead of the connection.
const AHEAD: usize = 4;
/// Chunks that a peer may have asked for and not got.
const QUEUE: usize = 4096;

/// Answers the node that has dialed this session of the shape [`Chunks`](crate::wire::Shape::Chunks), until it closes it: each chunk as it is in the
/// store, verified, or the word that it is not there.
pub async fn serve(chunks: Arc<Chunks>, session: Session, shutdown: CancellationToken) {
    let peer = session.peer;
    let (_sender, mut receiver) = control::start(session.control);
    let Some(data) = session.data.into_iter().next() else {
        return;
    };
    let (_reader, mut writer) = data.split();
    let (asked, queue) = mpsc::channel::<Digest>(QUEUE);
    let answers = async move {
        let queue = futures::stream::unfold(queue, |mut queue| async move {
            queue.recv().await.map(|digest| (digest, queue))
        });
        let read = |digest: Digest| read(&chunks, digest);
        let mut answers = std::pin::pin!(queue.map(read).buffered(AHEAD));
        while let Some((digest, chunk)) = answers.next().await {
            let digest = digest.0;
            let answer = match chunk {
                Some(raw) => Data::Chunk { digest, raw },
                None => Data::Absent { digest },
            };
            if let Err(error) = writer.send(&answer).await {
                return chain(&error);
            }
        }
        "it is answered".to_owned()
    };
    let questions = async {
        loop {
            match receiver.recv().await {
                Ok(Control::ChunksWanted(wanted)) => {
                    for digest in wanted.digests {
                        if asked.try_send(Digest(digest)).is_err() {
                            return format!("it asks for more than {QUEUE} chunks at once");
                        }
                    }
                }
                Ok(message) => {
                    return format!("it said {} on a session for chunks", message.name());
                }
                Err(error) => return chain(&error),
            }
        }
    };
    let reason = tokio::select! {
        reason = answers => reason,
        reason = questions => reason,
        () = shutdown.cancelled() => return,
    };
    tracing::debug!(peer, reason, "a session for chunks ended");
}

/// Bytes of the longest chunk that a frame takes.
const LONGEST: usize = 1 << 20;

async fn read(chunks: &Arc<Chunks>, digest: Digest) -> (Digest, Option<Bytes>) {
    let chunks = Arc::clone(chunks);
    let chunk = tokio::task::spawn_blocking(move || chunks.read_known(&digest)).await;
    let chunk = chunk.ok().flatten();
    (digest, chunk.filter(|chunk| chunk.len() <= LONGEST))
}
