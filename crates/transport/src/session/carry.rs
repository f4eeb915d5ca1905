//! Moves frames between the core and one set of connections, until the first of them fails.

use std::{convert::Infallible, io, sync::Arc};

use bytes::Buf;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::TcpStream,
    task::JoinSet,
    time::{timeout, timeout_at},
};
use tokio_rustls::TlsStream;

use super::{
    core::{Role, Transmit, Violation},
    frame::{Decoder, Frame},
    link::{Connections, LinkError},
    shared::Shared,
};

type Stream = TlsStream<TcpStream>;

/// What ended a set of connections.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// The tasks that read and write one set of connections; each ends with a fault.
pub(super) type Carriers = JoinSet<Result<Infallible, Fault>>;

/// Starts to carry frames.
pub(super) fn carriers(shared: &Arc<Shared>, connections: Connections) -> Carriers {
    let mut tasks = JoinSet::new();
    for (role, stream) in connections.streams {
        let (reader, writer) = split(stream);
        tasks.spawn(read_frames(shared.clone(), role, reader));
        tasks.spawn(write_frames(shared.clone(), role, writer));
    }
    tasks
}

/// Waits until a connection fails.
pub(super) async fn first_fault(carriers: &mut Carriers) -> Fault {
    match carriers.join_next().await {
        Some(Ok(Err(fault))) => fault,
        // There is always a connection, so that what remains is a panic.
        _ => LinkError::Stopped.into(),
    }
}

async fn read_frames(
    shared: Arc<Shared>,
    role: Role,
    mut reader: ReadHalf<Stream>,
) -> Result<Infallible, Fault> {
    let mut decoder = Decoder::default();
    let mut frames = Vec::new();
    loop {
        let reading = reader.read_buf(decoder.buffer());
        let read = match role {
            // The peer may have no bulk to send; here it is heard every second.
            Role::Urgent => timeout(shared.silence(), reading)
                .await
                .map_err(|_| LinkError::Silent { silence: shared.silence() })?,
            Role::Bulk { .. } => reading.await,
        };
        if read.map_err(|error| LinkError::reading(role, error))? == 0 {
            return Err(LinkError::reading(role, io::ErrorKind::UnexpectedEof.into()).into());
        }
        while let Some(frame) = decoder.next_frame().map_err(Violation::from)? {
            frames.push(frame);
        }
        if !frames.is_empty() {
            shared.receive(role, &mut frames)?;
        }
    }
}

async fn write_frames(
    shared: Arc<Shared>,
    role: Role,
    mut writer: WriteHalf<Stream>,
) -> Result<Infallible, Fault> {
    let failed = |error| LinkError::writing(role, error);
    loop {
        let (transmit, changed) = shared.poll_transmit(role);
        match transmit {
            Transmit::Frame(frame) => write_frame(&mut writer, frame).await.map_err(failed)?,
            Transmit::Wait(until) => {
                writer.flush().await.map_err(failed)?;
                // Either way the core is asked again.
                let _ = timeout_at(until.into(), changed).await;
            }
            Transmit::Idle => {
                writer.flush().await.map_err(failed)?;
                changed.await;
            }
        }
    }
}

/// Writes header and payload together, so that they share TLS records.
async fn write_frame(writer: &mut WriteHalf<Stream>, frame: Frame) -> io::Result<()> {
    let header = frame.header.encode();
    writer.write_all_buf(&mut Buf::chain(header.as_slice(), frame.payload)).await
}
