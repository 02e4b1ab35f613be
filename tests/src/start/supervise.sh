# Runs one server for as long as the test process lives. Standard input is a pipe whose other end only the test process
# holds, so its end is noticed however it came, SIGKILL included; then the server ends and its folder goes.
# With AGAIN it is started again whenever it ends. `setup`, `serve` and STOP come from the script in front of this one.
trap 'rm -rf "$FOLDER"' EXIT
exec 3<&0 </dev/null

# In the foreground: were the test process to die now, its end is noticed right after.
if ! setup 3<&- >"$FOLDER/log" 2>&1; then
  tail -n 20 "$FOLDER/log"
  exit 1
fi

while :; do
  (exec 3<&-; serve) >>"$FOLDER/log" 2>&1 &
  server=$!
  # Again and again: what reaches the server before it can handle signals is lost.
  (read -r line <&3; : >"$FOLDER/over"; while kill -s "$STOP" "$server"; do sleep 0.1; done) >/dev/null 2>&1 &
  lifeline=$!
  wait "$server"

  # A server that lasts, and was killed: what is left of it ends first.
  [ -n "$AGAIN" ] && [ ! -e "$FOLDER/over" ] || break
  kill "$lifeline" 2>/dev/null
  # In another second: UUID_SHORT of MySQL and MariaDB repeats itself if a server is started twice within one.
  sleep 1.1
done

# Still there if the server ended by itself; then say why.
if kill "$lifeline" 2>/dev/null; then
  tail -n 20 "$FOLDER/log"
fi
exit 1
