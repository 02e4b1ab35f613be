use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::Server;

/// A pooler in front of PostgreSQL, in transaction mode with a pool of one: all its clients share one session of the
/// server, one transaction after the other. The first client logs in at the server, the others are let in.
///
/// It knows as much of the protocol as that needs, and it runs until the process ends.
///
/// # Panics
///
/// If no port is free.
pub fn start_transaction_pooler(server: &Server) -> Server {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let target = server.address();
    thread::spawn(move || {
        let pool = Arc::new(Mutex::new(None));
        for client in listener.incoming().flatten() {
            let (pool, target) = (Arc::clone(&pool), target.clone());
            thread::spawn(move || {
                // A client that goes away in the middle of a transaction takes the session with it.
                let _ = serve(client, &pool, &target);
            });
        }
    });
    Server {
        url: server.at(port),
        ..server.clone()
    }
}

/// A session of the server, and what it said when it was opened.
struct Session {
    server: TcpStream,
    greeting: Vec<u8>,
}

type Pool = Mutex<Option<Session>>;

fn serve(mut client: TcpStream, pool: &Pool, target: &(String, u16)) -> io::Result<()> {
    client.set_nodelay(true)?;
    let startup = startup(&mut client)?;
    {
        let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
        match &*pool {
            Some(session) => client.write_all(&session.greeting)?,
            None => *pool = Some(log_in(&mut client, &startup, target)?),
        }
    }
    loop {
        let mut message = read(&mut client)?;
        let mut pool = pool.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(session) = &mut *pool else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        // A transaction begins.
        loop {
            if message[0] == b'X' {
                return Ok(());
            }
            session.server.write_all(&message)?;
            // Query and Sync are answered, at the end with ReadyForQuery.
            if matches!(message[0], b'Q' | b'S') && answer(session, &mut client)? == b'I' {
                break;
            }
            message = read(&mut client)?;
        }
    }
}

/// The first message of a client, after it was told that there is no encryption.
fn startup(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    loop {
        let mut message = vec![0; 4];
        client.read_exact(&mut message)?;
        let length = u32::from_be_bytes([message[0], message[1], message[2], message[3]]);
        message.resize(length as usize, 0);
        client.read_exact(&mut message[4..])?;
        // SSLRequest and GSSENCRequest.
        match message[4..8] {
            [0x04, 0xd2, 0x16, 0x2f | 0x30] => client.write_all(b"N")?,
            _ => return Ok(message),
        }
    }
}

/// Passes on what a client and the server say until the client is in.
fn log_in(
    client: &mut TcpStream,
    startup: &[u8],
    (host, port): &(String, u16),
) -> io::Result<Session> {
    let mut server = TcpStream::connect((host.as_str(), *port))?;
    server.set_nodelay(true)?;
    server.write_all(startup)?;
    let mut greeting = Vec::new();
    loop {
        let message = read(&mut server)?;
        client.write_all(&message)?;
        match (message[0], &message[5..]) {
            // AuthenticationOk, and what follows it.
            (b'R', [0, 0, 0, 0]) => greeting.extend(&message),
            // AuthenticationSASLFinal needs no answer.
            (b'R', [0, 0, 0, 12, ..]) => {}
            (b'R', _) => server.write_all(&read(client)?)?,
            (b'E', _) => return Err(io::ErrorKind::PermissionDenied.into()),
            (kind, _) => {
                greeting.extend(&message);
                if kind == b'Z' {
                    return Ok(Session { server, greeting });
                }
            }
        }
    }
}

/// Passes on the server's answer. Returns the state of the transaction.
fn answer(session: &mut Session, client: &mut TcpStream) -> io::Result<u8> {
    loop {
        let message = read(&mut session.server)?;
        client.write_all(&message)?;
        if message[0] == b'Z' {
            return Ok(message[5]);
        }
    }
}

/// One message: its kind, its length, and the rest.
fn read(from: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 5];
    from.read_exact(&mut message)?;
    let length = u32::from_be_bytes([message[1], message[2], message[3], message[4]]);
    message.resize(1 + length as usize, 0);
    from.read_exact(&mut message[5..])?;
    Ok(message)
}
