//! A web client outside the guest: it asks for pages at a steady rate and notes when each was there.
//!
//! Each request has a connection and a thread of its own and waits for no other, so that a stall shows in all requests
//! that it met, and in none after them. Real clients don't run on the hosts: these threads run in real time (SCHED_FIFO)
//! where they may, so that what a host computes doesn't show as a slow answer.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant, SystemTime},
};

use crate::{
    namespace::{EnterError, Namespace},
    relay::rise_to_real_time,
};

/// A page that isn't there by then doesn't count as answered.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// The time from one request to the next.
const EVERY: Duration = Duration::from_millis(10);
/// Pages are `/0` and so on.
const PAGES: usize = 256;
/// Requests that may be under way. One more goes without an answer.
const UNDER_WAY_MAX: usize = 512;
/// Enough for one request.
const STACK_BYTES: usize = 64 << 10;
/// The first line of a page that was found.
const FOUND: &[u8] = b"HTTP/1.1 200 ";

/// Asks one server for pages until it is dropped.
#[derive(Debug)]
pub struct WebClient {
    exchanges: Arc<Mutex<Vec<Exchange>>>,
}

/// A request and what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exchange {
    /// When it was made, before the connection was.
    pub asked: SystemTime,
    /// When all of the page was there; `None`: not yet, or never.
    pub answered: Option<SystemTime>,
}

impl WebClient {
    /// Begins to ask, from the clients' namespace.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn start(clients: &Namespace, server: SocketAddr) -> Result<WebClient, EnterError> {
        let exchanges = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::downgrade(&exchanges);
        // Threads that are started in a namespace are in it.
        clients.run(|| std::thread::spawn(move || keep_asking(server, &kept)))?;
        Ok(WebClient { exchanges })
    }

    /// All requests so far, in the order in which they were made.
    pub fn exchanges(&self) -> Vec<Exchange> {
        lock(&self.exchanges).clone()
    }
}

fn keep_asking(server: SocketAddr, exchanges: &Weak<Mutex<Vec<Exchange>>>) {
    rise_to_real_time();
    let under_way = Arc::new(());
    let mut next = Instant::now();
    for page in (0..PAGES).cycle() {
        let Some(kept) = exchanges.upgrade() else { return };
        let number = enter(&kept);
        if Arc::strong_count(&under_way) <= UNDER_WAY_MAX {
            let (exchanges, under_way) = (exchanges.clone(), Arc::clone(&under_way));
            let exchange = move || {
                let answered = ask(server, page).is_ok().then(SystemTime::now);
                if let Some(kept) = exchanges.upgrade() {
                    lock(&kept)[number].answered = answered;
                }
                drop(under_way);
            };
            // Without a thread the request stays without an answer.
            let _ = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(exchange);
        }
        drop(kept);
        next = (next + EVERY).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Notes that a request is made now; returns its number.
fn enter(exchanges: &Mutex<Vec<Exchange>>) -> usize {
    let mut exchanges = lock(exchanges);
    exchanges.push(Exchange { asked: SystemTime::now(), answered: None });
    exchanges.len() - 1
}

/// Gets a page, in HTTP/1.0, so that the server closes the connection after it.
fn ask(server: SocketAddr, page: usize) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("GET /{page} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut head = [0; FOUND.len()];
    stream.read_exact(&mut head)?;
    io::copy(&mut stream, &mut io::sink())?;
    if head == *FOUND { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn lock(exchanges: &Mutex<Vec<Exchange>>) -> MutexGuard<'_, Vec<Exchange>> {
    exchanges.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that answers one request with `answer`.
    fn serve(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut request = [0; 17];
            client.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"GET /7 HTTP/1.0\r\n");
            client.read_exact(&mut [0; 2]).unwrap();
            client.write_all(answer.as_bytes()).unwrap();
        });
        address
    }

    #[test]
    fn only_a_page_that_was_found_is_an_answer() {
        ask(serve("HTTP/1.1 200 OK\r\n\r\npage"), 7).unwrap();
        assert!(ask(serve("HTTP/1.1 404 Not Found\r\n\r\n"), 7).is_err());
        assert!(ask(serve("HTTP"), 7).is_err());
    }

    #[test]
    fn requests_are_noted_in_their_order_and_end_with_the_client() {
        let exchanges = Mutex::new(Vec::new());
        assert_eq!((enter(&exchanges), enter(&exchanges)), (0, 1));
        let exchanges = exchanges.into_inner().unwrap();
        assert!(exchanges[0].asked <= exchanges[1].asked && exchanges[1].answered.is_none());
        // Returns at once: nobody wants to know.
        keep_asking(([127, 0, 0, 1], 9).into(), &Weak::new());
    }
}
