# SIGQUIT is PostgreSQL's immediate shutdown. SIGKILL would leave its shared memory behind.
STOP=QUIT

setup() {
  echo test >"$FOLDER/password"
  "$INITDB" --pgdata="$FOLDER/data" --username=test --pwfile="$FOLDER/password" --auth=scram-sha-256 \
    --encoding=UTF8 --locale=C --no-sync
  if [ -n "$STANDBY" ]; then
    echo "CREATE DATABASE test" | "$SERVER" --single -D "$FOLDER/data" postgres
    touch "$FOLDER/data/standby.signal"
  fi
  # A locale for messages of another language, where the machine can make one.
  if [ -n "$OPTIONS" ] && mkdir "$FOLDER/locale" && localedef -i de_DE -f UTF-8 "$FOLDER/locale/de_DE.UTF-8"; then
    export LOCPATH="$FOLDER/locale"
  fi
}

serve() {
  exec "$SERVER" -D "$FOLDER/data" -c port="$PORT" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
    -c max_connections=200 -c fsync=off -c synchronous_commit=off -c full_page_writes=off $OPTIONS
}
