@echo off
rem Makes the environment if there is none, and opens the page: start.bat [--update] [--setup] [options of sdlora ui]
setlocal
cd /d "%~dp0"
if exist .venv\Scripts\python.exe goto run
set "CHOSEN="
for %%v in (3.13 3.12 3.11) do (
    if not defined CHOSEN py -%%v -c "import venv" >nul 2>nul && set "CHOSEN=py -%%v"
)
if not defined CHOSEN python -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" >nul 2>nul && set "CHOSEN=python"
if not defined CHOSEN goto none
echo making the environment in "%CD%\.venv" ...
%CHOSEN% -m venv .venv
if errorlevel 1 goto failed
:run
.venv\Scripts\python.exe -m sdlora.commands.start %*
if errorlevel 1 goto failed
exit /b 0
:none
echo sdlora needs Python 3.11, 3.12 or 3.13: https://www.python.org/downloads/windows/
:failed
pause
exit /b 1
