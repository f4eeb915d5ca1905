//! How fast a session moves bytes on loopback, TLS included: `cargo run --release --example throughput [connections]`.

use std::{
    error::Error,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use godwit_transport::{
    identity::{Authority, HostIdentity, HostName, Validity},
    route::Route,
    session::{AcceptConfig, ConnectConfig, Lane, Limits, Session, Timeouts},
};
use tokio::{net::TcpListener, sync::mpsc};

const MESSAGE_BYTES: usize = 128 * 1024;
const TOTAL_BYTES: usize = 8 << 30;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let bulk_connections = std::env::args().nth(1).map_or(Ok(1), |argument| argument.parse())?;
    let (source, target) = pair(bulk_connections).await?;
    let cpu_before = cpu_seconds()?;
    let began = Instant::now();
    let sending = tokio::spawn(async move {
        let payload = Bytes::from(vec![0x5a; MESSAGE_BYTES]);
        for _ in 0..TOTAL_BYTES / MESSAGE_BYTES {
            source.send(Lane::Bulk, 1, payload.clone()).await?;
        }
        source.flush().await?;
        Ok::<_, godwit_transport::session::SessionError>(source)
    });
    let mut received = 0;
    while received < TOTAL_BYTES {
        received += target.recv(Lane::Bulk).await?.map_or(0, |message| message.payload.len());
    }
    let source = sending.await??;
    let seconds = began.elapsed().as_secs_f64();
    let gigabytes = TOTAL_BYTES as f64 / 1e9;
    let cpu = cpu_seconds()? - cpu_before;
    println!("{bulk_connections} bulk connections: {:.2} GB/s", gigabytes / seconds);
    println!("both ends together: {cpu:.1} CPU seconds, {:.2} GB per CPU second", gigabytes / cpu);
    println!("{:?}", source.stats());
    Ok(())
}

async fn pair(bulk_connections: u8) -> Result<(Session, Session), Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let now = SystemTime::now();
    let authority = Authority::create(&scratch.path().join("ca"), now)?;
    let join = |name: &HostName| -> Result<Arc<HostIdentity>, Box<dyn Error>> {
        let bundle = authority.issue(name, Validity::starting(now, Duration::from_secs(3600)))?;
        Ok(Arc::new(HostIdentity::join(&scratch.path().join(name.as_str()), &bundle, now)?))
    };
    let (source_name, target_name): (HostName, HostName) = ("source".parse()?, "target".parse()?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let (sender, streams) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if sender.send(stream).await.is_err() {
                return;
            }
        }
    });
    let target = AcceptConfig {
        peer: source_name.clone(),
        identity: join(&target_name)?,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
    };
    let source = ConnectConfig {
        address,
        route: Route::Migration("throughput".to_owned()),
        peer: target_name,
        identity: join(&source_name)?,
        bulk_connections,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
    };
    let (source, target) = tokio::join!(Session::connect(source), Session::accept(target, streams));
    Ok((source?, target?))
}

/// User and system time of this process.
fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: f64 =
        after_name.split_whitespace().skip(11).take(2).map(|field| field.parse().unwrap_or(0.0)).sum();
    Ok(ticks / 100.0)
}
