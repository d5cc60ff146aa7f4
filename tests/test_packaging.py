"""What pip installs is complete."""
import shutil, subprocess, sys, tarfile

def test_source_distribution(root, tmp_path):
    "It can be built from itself, and carries the tables and the sample."
    ignore = shutil.ignore_patterns('.git', '.venv', '_*', '*.egg-info', 'build', 'dist', '.pytest_cache', '.hypothesis')
    shutil.copytree(root, tmp_path/'a', ignore=lambda folder, names: ignore(folder, names) - {'__init__.py', '_modidx.py', '_quarto.yml'}, symlinks=True)
    for source in ('a', 'b'):
        subprocess.run([sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp_path/f'dist-{source}'], cwd=tmp_path/source, check=True, capture_output=True)
        with tarfile.open(next((tmp_path/f'dist-{source}').glob('*.tar.gz'))) as tar: tar.extractall(tmp_path/f'out-{source}', filter='data')
        made = next((tmp_path/f'out-{source}').iterdir())
        for name in ('settings.ini', 'README.md', 'LICENSE', 'sleepnb/positions.csv', 'sleepnb/sample/SC4001E0-PSG.edf', 'sleepnb/synth.json',
                     'sleepnb/stager.safetensors', 'sleepnb/montage.py'):
            assert (made/name).exists(), name
        if source == 'a': made.rename(tmp_path/'b')
