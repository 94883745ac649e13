//! Carries the packet log between the network mover and the urgent connection.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::flows::{self, NewFlows};
use crate::network::conntrack::Known;
use crate::network::{LogItem, LogKind, Port};
use crate::wire::bulk::{PacketKind, Urgent};
use crate::wire::conn::{Connection, LinkError, Reader, Writer};

/// Items that are written at once.
const BATCH: usize = 64;
/// How often new flows are looked for while nothing is logged.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Source: sends what the port logs, and hands it the acknowledgements. Ends with the link, or when the
/// port has dropped its sender and everything is written.
pub(super) async fn pump_out(
    connection: Connection<Urgent>,
    port: Port,
    items: mpsc::UnboundedReceiver<LogItem>,
    news: Option<NewFlows>,
) -> Result<(), LinkError> {
    let (reader, writer) = connection.split();
    tokio::select! {
        sent = send_items(writer, items, news) => sent,
        lost = read_acks(reader, port) => Err(lost),
    }
}

async fn send_items(
    mut writer: Writer<Urgent>,
    mut items: mpsc::UnboundedReceiver<LogItem>,
    news: Option<NewFlows>,
) -> Result<(), LinkError> {
    for flows in news.as_ref().map(NewFlows::again).unwrap_or_default() {
        writer.feed(&flows).await?;
    }
    let mut batch = Vec::with_capacity(BATCH);
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let received = tokio::select! {
            received = items.recv_many(&mut batch, BATCH) => received,
            // Packets that go through the tunnel leave no trace in the log.
            _ = looks.tick(), if news.is_some() => {
                if send_news(&mut writer, news.as_ref()).await? {
                    writer.flush().await?;
                }
                continue;
            }
        };
        if received == 0 {
            break;
        }
        // Asked after these packets have come: a packet's flow is told before the packet is.
        send_news(&mut writer, news.as_ref()).await?;
        for item in batch.drain(..) {
            writer.feed(&outgoing(item)).await?;
        }
        if items.is_empty() {
            writer.flush().await?;
        }
    }
    writer.flush().await?;
    // The acknowledgements of what was just written still come the other way: the other arm ends the pump.
    std::future::pending().await
}

/// Whether there was any.
async fn send_news(
    writer: &mut Writer<Urgent>,
    news: Option<&NewFlows>,
) -> Result<bool, LinkError> {
    let frames = news.map(NewFlows::take).unwrap_or_default();
    let any = !frames.is_empty();
    for flows in frames {
        writer.feed(&flows).await?;
    }
    Ok(any)
}

async fn read_acks(mut reader: Reader<Urgent>, port: Port) -> LinkError {
    loop {
        match reader.next().await {
            Ok(Urgent::PacketAck { seq }) => port.ack(seq),
            // Only the source logs packets; a peer that sends some is not one of ours.
            Ok(Urgent::Packet { .. } | Urgent::Flows(_) | Urgent::Bound(_)) => {
                return LinkError::Closed;
            }
            Err(error) => return error,
        }
    }
}

/// Destination: hands the port what comes, and sends its acknowledgements. Ends with the link.
pub(super) async fn pump_in(connection: Connection<Urgent>, port: Port) -> LinkError {
    let (reader, writer) = connection.split();
    let acked = port.acked();
    tokio::select! {
        lost = receive_items(reader, port) => lost,
        lost = send_acks(writer, acked) => lost,
    }
}

async fn receive_items(mut reader: Reader<Urgent>, port: Port) -> LinkError {
    loop {
        match reader.next().await {
            Ok(Urgent::Packet { seq, kind, frame }) => {
                if port.log_input(incoming(seq, kind, frame)).is_err() {
                    return LinkError::Closed;
                }
            }
            // Before the packets behind it.
            Ok(Urgent::Flows(frame)) => {
                if let Err(reason) = flows::take(&port, &frame, Known::Keep).await {
                    tracing::warn!(reason, "the packet log's connection is given up");
                    return LinkError::Closed;
                }
            }
            Ok(Urgent::Bound(frame)) => {
                if let Err(reason) = flows::take_bound(&port, &frame).await {
                    tracing::warn!(reason, "the packet log's connection is given up");
                    return LinkError::Closed;
                }
            }
            Ok(Urgent::PacketAck { .. }) => return LinkError::Closed,
            Err(error) => return error,
        }
    }
}

async fn send_acks(mut writer: Writer<Urgent>, mut acked: watch::Receiver<u64>) -> LinkError {
    loop {
        let seq = *acked.borrow_and_update();
        if let Err(error) = writer.send(&Urgent::PacketAck { seq }).await {
            return error;
        }
        if acked.changed().await.is_err() {
            // The port is gone, and with it the reason to acknowledge; the reader ends with the link.
            std::future::pending::<()>().await;
        }
    }
}

fn outgoing(item: LogItem) -> Urgent {
    Urgent::Packet {
        seq: item.seq,
        kind: match item.kind {
            LogKind::Residue => PacketKind::Residue,
            LogKind::Frame => PacketKind::Frame,
            LogKind::ResidueEnd => PacketKind::ResidueEnd,
            LogKind::End => PacketKind::End,
        },
        frame: item.frame,
    }
}

fn incoming(seq: u64, kind: PacketKind, frame: bytes::Bytes) -> LogItem {
    LogItem {
        seq,
        kind: match kind {
            PacketKind::Residue => LogKind::Residue,
            PacketKind::Frame => LogKind::Frame,
            PacketKind::ResidueEnd => LogKind::ResidueEnd,
            PacketKind::End => LogKind::End,
        },
        // The slice shares the read buffer; a held frame must not keep a megabyte alive.
        frame: bytes::Bytes::copy_from_slice(&frame),
    }
}
