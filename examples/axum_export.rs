//! A web service that runs each export for one client at a time, on any number of hosts. Its pool has five connections,
//! and its locks need none of them: `DATABASE_URL=.. cargo run --example axum_export`, then twice
//! `curl -X POST "localhost:3000/export/sales?seconds=9"`

use std::{collections::HashMap, env, error::Error, pin::Pin, process::ExitCode, time::Duration};

use axum::extract::{Path, Query, State};
use axum::{Router, http::StatusCode, routing::post};
use bb8::{ManageConnection, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager as Manager, PoolError};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{LockConnection, LockKey, LockManager};
use tokio_postgres::NoTls;

mod support;

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(support::on_server_async!(serve), 1)
}

struct Service<C: Exporter>
where
    Manager<C>: ManageConnection,
{
    locks: LockManager<C>,
    pool: Pool<Manager<C>>,
}

impl<C: Exporter> Clone for Service<C>
where
    Manager<C>: ManageConnection,
{
    fn clone(&self) -> Self {
        Self {
            locks: self.locks.clone(),
            pool: self.pool.clone(),
        }
    }
}

async fn serve<C: Exporter>(url: &str) -> support::Result<ExitCode>
where
    Manager<C>: ManageConnection<Connection = C, Error = PoolError>,
{
    support::connect_async::<C>(url).await?; // fails at once, where a pool would retry
    let pool = Pool::builder().max_size(5);
    let service = Service {
        locks: LockManager::<C>::at(url).build(),
        pool: pool.build_unchecked(Manager::<C>::new(url)),
    };
    let app = Router::new()
        .route("/export/{name}", post(export::<C>))
        .with_state(service);
    let address = env::args().nth(1).unwrap_or("127.0.0.1:3000".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(ExitCode::SUCCESS)
}

type Answer = (StatusCode, String);

/// If the client goes away, axum drops this future, perhaps in the middle of a statement. Then the statement is cancelled,
/// and the lock is free for the next client.
async fn export<C: Exporter>(
    State(service): State<Service<C>>,
    Path(name): Path<String>,
    Query(options): Query<HashMap<String, u64>>,
) -> Result<Answer, Answer>
where
    Manager<C>: ManageConnection<Connection = C, Error = PoolError>,
{
    let lock = service.locks.lock(LockKey::namespaced("export", &name));
    let Some(held) = lock.try_acquire().await.map_err(failed)? else {
        return Ok((StatusCode::CONFLICT, format!("{name} is being exported\n")));
    };
    let seconds = |what: &str| options.get(what).copied().unwrap_or_default();
    let work = async {
        // Only the work needs a connection of the pool.
        let mut conn = service.pool.get().await.map_err(failed)?;
        let cancel = CancelOnDrop(Some(Box::pin(conn.canceller())));
        // In a transaction, so that the pool discards the connection if this future is dropped in the middle of it.
        let done = (*conn)
            .transaction(async |conn| conn.batch_execute(&C::work(seconds("seconds"))).await)
            .await;
        cancel.disarm();
        done.map_err(|error: diesel::result::Error| failed(error))?;
        drop(conn);
        // The upload needs none.
        tokio::time::sleep(Duration::from_secs(seconds("upload"))).await;
        Ok(())
    };
    tokio::select! {
        done = work => done?,
        // Another host may export by now.
        () = held.lost() => return Err((StatusCode::SERVICE_UNAVAILABLE, format!("{name} was interrupted\n"))),
    }
    held.release().await.map_err(failed)?;
    Ok((StatusCode::OK, format!("{name} is exported\n")))
}

trait Exporter: LockConnection + 'static {
    /// The export: a statement that takes so long.
    fn work(seconds: u64) -> String;

    /// Cancels the statement that runs on this connection, through another connection.
    fn canceller(&self) -> impl Future<Output = ()> + Send + 'static;
}

impl Exporter for AsyncPgConnection {
    fn work(seconds: u64) -> String {
        format!("SELECT pg_sleep({seconds})")
    }

    fn canceller(&self) -> impl Future<Output = ()> + Send + 'static {
        let token = self.cancel_token();
        async move { drop(token.cancel_query(NoTls).await) }
    }
}

impl Exporter for AsyncMysqlConnection {
    fn work(seconds: u64) -> String {
        format!("SELECT SLEEP({seconds})")
    }

    fn canceller(&self) -> impl Future<Output = ()> + Send + 'static {
        let token = self.cancel_token();
        async move { drop(token.cancel_query().await) }
    }
}

/// Cancels the statement, if the future that waits for it is dropped.
struct CancelOnDrop(Option<Pin<Box<dyn Future<Output = ()> + Send>>>);

impl CancelOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = self.0.take() {
            tokio::spawn(cancel);
        }
    }
}

fn failed(error: impl Error) -> Answer {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}
