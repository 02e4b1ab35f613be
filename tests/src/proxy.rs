use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crate::Server;

/// A TCP proxy in front of a server, which counts round trips and makes the network fail. It understands no protocol.
///
/// # What counts
///
/// A round trip is a turn on the wire of one connection: bytes of the client, then bytes of the server. It counts when
/// the server's bytes pass, which is before the client can see them; so the count stands still, and is the same in
/// every run, once a client that sends one request after another has its answer. Hence
///
/// - what a client sends in a row is one round trip, in however many packets and messages: PostgreSQL's Parse, Bind,
///   Execute and Sync, for example;
/// - what is never answered is none: MySQL's `COM_STMT_CLOSE` and `COM_QUIT`, PostgreSQL's Terminate. Sent in front of
///   a request, it is a part of that;
/// - opening a connection takes some, so [`reset`](Self::reset) when it is open;
/// - what the server says unasked is none, unless unanswered bytes of the client came before.
///
/// A client that pipelines (sends a request without waiting for the last one's answer) takes one round trip or more as
/// the timing has it. tokio-postgres does so when it closes a prepared statement that was dropped: count such a
/// client's cached statements, or accept either number.
///
/// The proxy listens until it is dropped, which also cuts its connections.
#[derive(Debug)]
pub struct Proxy {
    url: String,
    port: u16,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    round_trips: AtomicU64,
    accepted: AtomicU64,
    stopped: AtomicBool,
    links: Mutex<Links>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Links {
    paused: bool,
    silent: bool,
    delay: Duration,
    open: Vec<Arc<Link>>,
}

/// One connection through the proxy.
#[derive(Debug)]
struct Link {
    client: TcpStream,
    server: TcpStream,
    /// The client's bytes were the last to pass.
    asked: AtomicBool,
    cut: AtomicBool,
}

impl Proxy {
    /// Listens on a free port and forwards to `server`.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub fn start(server: &Server) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener
            .local_addr()
            .expect("a listener has an address")
            .port();
        let state = Arc::new(State::default());
        let target = server.address();
        thread::spawn({
            let state = Arc::clone(&state);
            move || state.accept(&listener, &target)
        });
        Self {
            url: server.at(port),
            port,
            state,
        }
    }

    /// The server's URL, by way of this proxy.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The server, by way of this proxy: for what takes a [`Server`].
    pub fn server(&self, server: &Server) -> Server {
        Server {
            url: self.url.clone(),
            ..server.clone()
        }
    }

    /// The round trips of all connections since the start or the last [`reset`](Self::reset).
    pub fn round_trips(&self) -> u64 {
        self.state.round_trips.load(Ordering::SeqCst)
    }

    /// Sets [`round_trips`](Self::round_trips) to 0.
    pub fn reset(&self) {
        self.state.round_trips.store(0, Ordering::SeqCst);
    }

    /// How many connections clients have opened so far: a PostgreSQL CancelRequest is one, too.
    pub fn connections(&self) -> u64 {
        self.state.accepted.load(Ordering::SeqCst)
    }

    /// Closes every connection on both sides, without the protocol's goodbye. New ones can be opened.
    pub fn cut(&self) {
        for link in self.state.links().open.drain(..) {
            link.cut();
        }
        self.state.changed.notify_all();
    }

    /// Holds back what servers say, until [`resume`](Self::resume). What clients say still passes.
    pub fn pause(&self) {
        self.state.links().paused = true;
    }

    /// Stops forwarding, in both directions: nothing passes, and nobody learns that the other side has closed. As if a
    /// cable were pulled, until [`resume`](Self::resume).
    pub fn silence(&self) {
        self.state.links().silent = true;
    }

    /// Closes every connection towards the server only: the server sees the end of what clients say.
    pub fn half_close(&self) {
        for link in &self.state.links().open {
            let _ = link.server.shutdown(Shutdown::Write);
        }
    }

    /// Holds each piece back for so long, in both directions.
    pub fn delay(&self, delay: Duration) {
        self.state.links().delay = delay;
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.state.links().open.len()
    }

    /// Whether a client has said something since the server's last words passed.
    pub fn is_asked(&self) -> bool {
        let links = self.state.links();
        links
            .open
            .iter()
            .any(|link| link.asked.load(Ordering::SeqCst))
    }

    /// Lets pass what was said since [`pause`](Self::pause) or [`silence`](Self::silence).
    pub fn resume(&self) {
        let mut links = self.state.links();
        (links.paused, links.silent) = (false, false);
        drop(links);
        self.state.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        self.cut();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl State {
    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &TcpListener, target: &(String, u16)) {
        for client in listener.incoming() {
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            // A server that is down closes the client's connection.
            let Ok(link) = client.and_then(|client| Link::open(client, target)) else {
                continue;
            };
            let link = Arc::new(link);
            self.accepted.fetch_add(1, Ordering::SeqCst);
            self.links().open.push(Arc::clone(&link));
            thread::spawn({
                let (state, link) = (Arc::clone(self), Arc::clone(&link));
                move || {
                    let _ = forward(&link.client, &link.server, || {
                        link.asked.store(true, Ordering::SeqCst);
                        state.wait_while(&link, |links| links.silent);
                        state.sleep();
                    });
                    state.wait_while(&link, |links| links.silent);
                    state.close(&link);
                }
            });
            thread::spawn({
                let state = Arc::clone(self);
                move || {
                    let _ = forward(&link.server, &link.client, || {
                        state.wait_while(&link, |links| links.paused || links.silent);
                        state.sleep();
                        if link.asked.swap(false, Ordering::SeqCst) {
                            state.round_trips.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                    state.wait_while(&link, |links| links.silent);
                    state.close(&link);
                }
            });
        }
    }

    fn sleep(&self) {
        let delay = self.links().delay;
        if !delay.is_zero() {
            thread::sleep(delay);
        }
    }

    fn wait_while(&self, link: &Link, holds: impl Fn(&Links) -> bool) {
        let mut links = self.links();
        while holds(&links) && !link.cut.load(Ordering::SeqCst) {
            links = self
                .changed
                .wait(links)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// One side ended: so does the other, and nobody keeps the connection.
    fn close(&self, link: &Arc<Link>) {
        self.links().open.retain(|open| !Arc::ptr_eq(open, link));
        link.cut();
        self.changed.notify_all();
    }
}

impl Link {
    fn open(client: TcpStream, (host, port): &(String, u16)) -> io::Result<Self> {
        let server = TcpStream::connect((host.as_str(), *port))?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        Ok(Self {
            client,
            server,
            asked: AtomicBool::new(false),
            cut: AtomicBool::new(false),
        })
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        // Fails where the peer has closed already.
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.server.shutdown(Shutdown::Both);
    }
}

/// Copies until one side ends, calling `seen` in front of each write.
fn forward(mut from: &TcpStream, mut to: &TcpStream, seen: impl Fn()) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        seen();
        to.write_all(&buffer[..length])?;
    }
}
