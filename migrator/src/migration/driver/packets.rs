//! Carries the packet log between the network mover and the urgent connection.

use tokio::sync::{mpsc, watch};

use crate::network::{LogItem, LogKind, Port};
use crate::wire::bulk::{PacketKind, Urgent};
use crate::wire::conn::{Connection, LinkError, Reader, Writer};

/// Source: sends what the port logs, and hands it the acknowledgements. Ends with the link, or when the
/// port has dropped its sender and everything is written.
pub(super) async fn pump_out(
    connection: Connection<Urgent>,
    port: Port,
    items: mpsc::UnboundedReceiver<LogItem>,
) -> Result<(), LinkError> {
    let (reader, writer) = connection.split();
    tokio::select! {
        sent = send_items(writer, items) => sent,
        lost = read_acks(reader, port) => Err(lost),
    }
}

async fn send_items(
    mut writer: Writer<Urgent>,
    mut items: mpsc::UnboundedReceiver<LogItem>,
) -> Result<(), LinkError> {
    while let Some(item) = items.recv().await {
        writer.feed(&outgoing(item)).await?;
        if items.is_empty() {
            writer.flush().await?;
        }
    }
    writer.flush().await?;
    // The acknowledgements of what was just written still come the other way: the other arm ends the pump.
    std::future::pending().await
}

async fn read_acks(mut reader: Reader<Urgent>, port: Port) -> LinkError {
    loop {
        match reader.next().await {
            Ok(Urgent::PacketAck { seq }) => port.ack(seq),
            // Only the source logs packets; a peer that sends some is not one of ours.
            Ok(Urgent::Packet { .. }) => return LinkError::Closed,
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
