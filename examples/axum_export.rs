//! A web service that runs each export for one client at a time, on any number of hosts:
//! `DATABASE_URL=.. cargo run --example axum_export`, then twice `curl -X POST "localhost:3000/export/sales?seconds=9"`

use std::{collections::HashMap, env, error::Error, process::ExitCode};

use axum::extract::{Path, Query, State};
use axum::{Router, http::StatusCode, routing::post};
use bb8::{ManageConnection, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager as Manager, PoolError};
use diesel_async::{AsyncMysqlConnection, AsyncPgConnection};
use dlock_diesel_async::{AdvisoryLock, LockConnection, LockKey};
use tokio_postgres::NoTls;

mod support;

#[tokio::main]
async fn main() -> ExitCode {
    support::exit_code(support::on_server_async!(serve), 1)
}

async fn serve<C: Exporter>(url: &str) -> support::Result<ExitCode>
where
    Manager<C>: ManageConnection<Connection = C, Error = PoolError>,
{
    support::connect_async::<C>(url).await?; // fails at once, where a pool would retry
    let pool = Pool::builder().build_unchecked(Manager::<C>::new(url));
    let app = Router::new()
        .route("/export/{name}", post(export::<C>))
        .with_state(pool);
    let address = env::args().nth(1).unwrap_or("127.0.0.1:3000".into());
    let listener = tokio::net::TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(ExitCode::SUCCESS)
}

type Answer = (StatusCode, String);

/// If the client goes away, axum drops this future, perhaps in the middle of a statement. `cancel_with` ends that
/// statement, and then the lock is free for the next client. Otherwise it would be free when the statement has ended.
async fn export<C: Exporter>(
    State(pool): State<Pool<Manager<C>>>,
    Path(name): Path<String>,
    Query(options): Query<HashMap<String, u64>>,
) -> Result<Answer, Answer>
where
    Manager<C>: ManageConnection<Connection = C, Error = PoolError>,
{
    let conn = pool.get_owned().await.map_err(failed)?;
    let lock = AdvisoryLock::new(conn, LockKey::namespaced("export", &name));
    let Some(lock) = lock.try_acquire().await.map_err(failed)? else {
        return Ok((StatusCode::CONFLICT, format!("{name} is being exported\n")));
    };
    let cancel = lock.canceller();
    let mut lock = lock.cancel_with(cancel);
    let seconds = options.get("seconds").copied().unwrap_or_default();
    lock.batch_execute(&C::work(seconds))
        .await
        .map_err(failed)?;
    lock.release().await.map_err(failed)?;
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

fn failed(error: impl Error) -> Answer {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}
